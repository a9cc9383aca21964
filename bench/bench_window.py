"""Episodes per second of training batches in a PromptWindow, against a pass through Qwen for every batch.

Both sides run the same batches through the whole model (prompt, policy, agent, loss, backward) and end with the same
Qwen gradient, summed over the batches: it is compared first, and without agreement there is no figure. What differs is
how often Qwen runs. That depends on how many batches use a prompt, so the number of different prompts is varied, from
every batch asking for the same ones to none returning. Qwen's optimizer step is on neither side.

    python bench/bench_window.py                                # the tiny Qwen
    python bench/bench_window.py --qwen 0.5b --batch-size 4 --max-prompt-tokens 64 --repeats 1
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, Qwen2Config

from qwen_fused.config import TrainConfig
from qwen_fused.data import Episode, collate, load_tasks
from qwen_fused.model import QwenPlanner
from qwen_fused.tiny import byte_tokenizer, seeded
from qwen_fused.window import PromptWindow

RESULTS = Path(__file__).parent / "results"
# Qwen2.5-0.5B's config.json
HALF_BILLION = dict(
    vocab_size=151936,
    hidden_size=896,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
LIMIT = 1e-5


def save_half_billion(folder: Path) -> str:
    """Qwen2.5-0.5B's shape with random weights, in bfloat16 on disk, and a byte tokenizer."""
    with seeded(0):
        AutoModel.from_config(Qwen2Config(**HALF_BILLION), dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def batches_of(prompts: int, batches: int, batch_size: int) -> list[list[Episode]]:
    """ARC-1 episodes whose demonstrations come from `prompts` different sets, used in turn, with queries that vary."""
    tasks = [task for task in load_tasks("arc1").tasks if len(task.train) >= 3]
    if prompts > len(tasks):
        raise SystemExit(f"--prompts must be at most {len(tasks)}, got {prompts}")
    tasks = tasks[:: len(tasks) // prompts][:prompts]
    shown = {task.id: task.train[: max(len(task.train) - 2, 1)] for task in tasks}
    episodes = []
    for use in range(batches * batch_size):
        task = tasks[use % prompts]
        queries = task.train[len(shown[task.id]) :]
        pair = queries[(use // prompts) % len(queries)]
        episodes.append(Episode(task.id, shown[task.id], pair.input, pair.output, use % prompts))
    return [episodes[start : start + batch_size] for start in range(0, len(episodes), batch_size)]


class Side:
    """One way to run the batches; `mode` None asks Qwen at every batch."""

    def __init__(self, model: QwenPlanner, mode: str | None, device: torch.device):
        self.model, self.mode, self.device = model, mode, device

    def run(self, batches: list[list[Episode]]) -> tuple[float, list[torch.Tensor]]:
        """Seconds for all batches, and Qwen's gradient."""
        self.model.zero_grad(set_to_none=True)
        prompt, hook = self.model.prompt, None
        if self.mode:
            window = PromptWindow(prompt.pooled, len(batches), mode=self.mode)
            hook = prompt.register_forward_pre_hook(lambda module, args: (args[0], window.prompts(args[0])))
        self._wait()
        started = time.perf_counter()
        for number, episodes in enumerate(batches):
            torch.manual_seed(number)
            self.model(collate(episodes).to(self.device), epoch=1).loss.backward()
        if hook:
            window.flush()
            hook.remove()
        self._wait()
        seconds = time.perf_counter() - started
        return seconds, [p.grad for p in prompt.qwen_parameters()]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def relative_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Norm of the difference over all tensors, relative to the norm of `want`."""
    difference = torch.stack([(g - w).norm() for g, w in zip(got, want, strict=True)]).norm()
    return float(difference / torch.stack([w.norm() for w in want]).norm())


def measure(model: QwenPlanner, batches: list[list[Episode]], repeats: int, device: torch.device) -> dict:
    """Interleaved timings of the uncached way and both modes of the window, gradients compared first."""
    sides = {name: Side(model, mode, device) for name, mode in
             (("every batch", None), ("recompute", "recompute"), ("retain", "retain"))}  # fmt: skip
    want = [g.clone() for g in sides["every batch"].run(batches)[1]]
    errors = {name: relative_error(side.run(batches)[1], want) for name, side in sides.items() if side.mode}
    del want
    gc.collect()
    if max(errors.values()) > LIMIT:
        raise SystemExit(f"the window's gradient is not the uncached one: relative errors {errors}; no figures")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side.run(batches)[0])
    episodes = sum(map(len, batches))
    report = {"gradient_error": errors}
    for name, times in seconds.items():
        cuts = statistics.quantiles(times, n=5) if len(times) > 1 else [times[0]] * 4
        median = statistics.median(times)
        report[name] = {
            "episodes_per_second": episodes / median,
            "p20": episodes / cuts[3],
            "p80": episodes / cuts[0],
            "speed_up": statistics.median(b / t for b, t in zip(seconds["every batch"], times, strict=True)),
        }
    return report


def machine(device: torch.device) -> dict:
    """What a figure belongs to."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qwen", default="tiny", help='"tiny", "0.5b" (random weights, true shape), or a path')
    parser.add_argument("--prompts", type=int, nargs="+", help="different prompts in the window")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    uses = arguments.batches * arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        qwen = save_half_billion(Path(folder)) if arguments.qwen == "0.5b" else arguments.qwen
        config = TrainConfig(qwen=qwen, max_prompt_tokens=arguments.max_prompt_tokens)
        model = QwenPlanner(config).to(device).train()
    rows = {}
    for prompts in arguments.prompts or [arguments.batch_size, 2 * arguments.batch_size, uses]:
        batches = batches_of(prompts, arguments.batches, arguments.batch_size)
        rows[f"{prompts} prompts for {uses} uses"] = row = measure(model, batches, arguments.repeats, device)
        line = ", ".join(
            f"{name} {row[name]['episodes_per_second']:.1f}/s ({row[name]['speed_up']:.2f}x)"
            for name in ("every batch", "recompute", "retain")
        )
        print(f"{arguments.qwen}, {prompts} prompts for {uses} episodes: {line}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"window_{arguments.qwen.replace('/', '_')}_{device.type}.json"
    shape = {key: getattr(arguments, key) for key in ("batches", "batch_size", "max_prompt_tokens", "repeats")}
    path.write_text(json.dumps({"machine": machine(device), **shape, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
