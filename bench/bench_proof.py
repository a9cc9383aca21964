"""What one proof costs: time in training steps, peak memory in the model's weights; CPU, one thread.

    python bench/bench_proof.py [--rounds 3] [--half-billion]

A GPT-2 of 124 million parameters with AdamW on one sequence of 32 tokens; with --half-billion Qwen2.5-0.5B's shape once
too, which takes 16 GiB. CPU seconds of the process, step and proof in turns: the figure is the median over rounds of a
proof over the steps before and after it. Memory is what the process holds at most beyond model and optimizer, the
optimizer's state included where the proof or the step makes it. A proof that does not say "proved" gets no figure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# before torch, which reads when it loads how OpenMP is to wait
import harness
import torch
from material import HALF_BILLION
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen_fused.proof.prove import prove

TOKENS = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loop:
    """A training loop whose optimizer has not stepped."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def prove(self) -> None:
        """One proof.

        Raises:
            harness.WrongResult: it says anything but proved.
        """
        report = prove(self.loss, self.model, self.optimizer)
        if report.verdict != "proved":
            raise harness.WrongResult(f"the loop is healthy: no time\n{report}")

    @property
    def weight_mb(self) -> float:
        """Size of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters()) / 1e6


@dataclass(frozen=True)
class Cost:
    """Figures of one case: CPU seconds of a step and a proof, and megabytes that each takes at most."""

    case: str
    step_s: float
    proof_s: float
    in_steps: float
    step_mb: float | None
    proof_mb: float | None
    weight_mb: float

    def __str__(self) -> str:
        text = f"{self.case}: a step {self.step_s:.2f} s, a proof {self.proof_s:.1f} s: {self.in_steps:.1f} steps"
        if self.step_mb is None or self.proof_mb is None:
            return text
        weights = [mb / self.weight_mb for mb in (self.step_mb, self.proof_mb)]
        return f"{text}; memory {weights[0]:.1f} times the weights in a step, {weights[1]:.1f} in a proof"


def small_gpt2() -> Loop:
    """GPT-2 of 12 layers and width 768 with random weights, its dropout as it is."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return loop_of(GPT2LMHeadModel(GPT2Config()))


def half_billion() -> Loop:
    """Qwen2.5-0.5B's shape with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return loop_of(Qwen2ForCausalLM(Qwen2Config(**HALF_BILLION)))


def loop_of(model: nn.Module) -> Loop:
    """A causal language model with AdamW on one sequence."""
    tokens = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Loop(model.train(), optimizer, lambda: model(tokens, labels=tokens).loss)


def cost(case: str, make: Callable[[], Loop], rounds: int) -> Cost:
    """Measure a case, memory first: the first step makes the optimizer's state, and so does a proof before it."""
    torch.manual_seed(0)
    loop = make()
    proof_mb = harness.peak_mb(harness.Call(lambda _: loop.prove()), CPU)
    step_mb = harness.peak_mb(harness.Call(lambda _: loop.step()), CPU)
    steps, proofs = [cpu_seconds(loop.step)], []
    for _ in range(rounds):
        # as before a run: an optimizer that has stepped has state to be kept, and its next step makes it anew
        loop.optimizer.state.clear()
        proofs.append(cpu_seconds(loop.prove))
        loop.step()
        steps.append(cpu_seconds(loop.step))
    ratios = [2 * proof / (before + after) for proof, before, after in zip(proofs, steps, steps[1:], strict=False)]
    medians = (statistics.median(found) for found in (steps, proofs, ratios))
    return Cost(case, *medians, step_mb, proof_mb, loop.weight_mb)


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU seconds of the process for one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def costs(rounds: int, with_half_billion: bool) -> Iterator[Cost]:
    """All cases, one model at a time."""
    yield cost("GPT-2, 124 M parameters", small_gpt2, rounds)
    if with_half_billion:
        yield cost("Qwen2.5-0.5B's shape", half_billion, 1)


def main(line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="proofs that are timed of the small model")
    parser.add_argument("--half-billion", action="store_true", help="Qwen2.5-0.5B's shape too, 16 GiB")
    arguments = parser.parse_args(line)
    torch.set_num_threads(1)
    for found in costs(arguments.rounds, arguments.half_billion):
        print(found, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
