"""What a training loop does with a proof's report: go on, warn, or stop before the first step."""

from __future__ import annotations

import logging

import torch

from qwen_fused.proof.ladder import ProofReport

log = logging.getLogger("qwen_fused")


class GradientError(RuntimeError):
    """The gradient of a training step is broken; the message is the ladder.

    Args:
        report: what the proof found.
    """

    def __init__(self, report: ProofReport):
        where = "" if report.verdict == "broken" else " in another process"
        super().__init__(f"the gradient is broken{where}, and no step was taken\n{report}")
        self.report = report


def settle(report: ProofReport, only_warn: bool, device: torch.device | str = "cpu") -> None:
    """Stop where the gradient is broken, in every process where it is in one; warn of what is not proved, and of a cut.

    Args:
        report: of this process.
        only_warn: whether to go on all the same.
        device: that the process group, where there is one, can reduce on.

    Raises:
        GradientError: when the gradient is broken, unless `only_warn`.
    """
    broken = torch.tensor(float(report.verdict == "broken"), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # one process that stops alone would leave the others waiting for it
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
    if broken and not only_warn:
        raise GradientError(report)
    first_line = str(report).partition("\n")[0]
    log.log(logging.INFO if report.headline == "proved" else logging.WARNING, "%s", first_line if report.ok else report)
