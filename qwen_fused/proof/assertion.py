"""`qwen_fused.testing.assert_gradient`: the proof as an assertion of a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qwen_fused.proof.ladder import ProofReport
from qwen_fused.proof.prove import prove
from qwen_fused.proof.subject import Optimizers


def assert_gradient(
    loss_fn: Callable[[], Any], params: nn.Module | Mapping[str, Any], optimizer: Optimizers = None, **options: Any
) -> ProofReport:
    """Assert that the gradient of a loss reaches parameters, is right and, with an optimizer, moves them.

    Args:
        loss_fn: as in `prove`: called without arguments, returns the loss of one fixed batch, a 0-d tensor.
        params: as in `prove`: a module, or a mapping of names to parameters or modules.
        optimizer: as in `prove`: a torch optimizer, several, or None.
        options: other keyword arguments of `prove`, `allow` for example.

    Returns:
        ProofReport, every rung of which holds.

    Raises:
        AssertionError: where one does not, or could not be judged; the message is the ladder, with the line.
    """
    # pytest points at the line that asserts, not into this one
    __tracebackhide__ = True
    report = prove(loss_fn, params, optimizer, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report
