"""The cross-entropy of the loss alone, weighted by how wrong its cell or its episode is.

    CPU   csrc/loss/cross_entropy.cpp: plain tensors go past the dispatcher, others through the op
          qwen_fused::hard_cell_cross_entropy; both are efe_loss in C++ with the other terms off
    else  the way of `efe_loss`

A call of its own, as on a few cells the way through `efe_loss` takes longer than the loss: C++ reads logits in the
shape that they come in, looks at the arguments itself, and asks Python only for the words where it finds one wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_fused import backends
from qwen_fused.kernels.reference import COLUMNS, TERMS
from qwen_fused.loss import checks, transforms
from qwen_fused.loss.autograd import ARGUMENTS, HARD_MODE
from qwen_fused.loss.checks import check_flat, check_float, check_options, check_target_range
from qwen_fused.loss.dispatch import resolve_backend, run_op, run_reference
from qwen_fused.loss.efe_loss import EFEOutput

# None for what is not plain: an argument that is wrong, a subclass, a mode, a transform, a tangent
DIRECT: Callable[..., tuple[Any, ...] | None] | None = None
if backends.HAS_EXTENSION:
    import qwen_fused._C

    DIRECT = getattr(qwen_fused._C, "hard_cell_cross_entropy", None)

REDUCTIONS = ("mean", "episode", "none")
ON = [name == "ce" for name in TERMS]
WEIGHTS = [float(on) for on in ON]
OTHERS = dict.fromkeys(ARGUMENTS[2:])
CE, HARD, ACCURACY = (COLUMNS.index(name) for name in ("ce", "hard", "accuracy"))


def hard_cell_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    hard_floor: float = 0.5,
    hard_mode: str = "episode",
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> EFEOutput:
    """Weight a cross-entropy by how wrong its episode or cell is: `efe_loss` with that term alone.

    [N, C] is one episode of N cells: with hard_mode="none" the loss is F.cross_entropy(logits, target,
    weight=class_weight, ignore_index=ignore_index), but 0 where that divides 0 by 0: when every cell is ignored, or
    the class weights of all that count are 0. [B, C, H, W] is B episodes: the mean over an episode's cells comes
    before the mean over the episodes.

    Args:
        logits: [N, C] or [B, C, H, W] float, any strides. C <= 64.
        target: [N] or [B, H, W] integer classes, `ignore_index` where there is no cell.
        class_weight, hard_floor, hard_mode, ignore_index, backend: as in `efe_loss`.
        reduction: "mean"; "episode" gives each episode's loss, 0 where it has no cell; "none" gives each cell's,
            weighted but not divided by anything, 0 where it is ignored, as F.cross_entropy(reduction="none") does.
            The last two are torch's own softmax: they take longer, and a second derivative.

    Returns:
        As `efe_loss`, with `predicted` in the shape of `target`; per-episode results are [1] for [N, C]. `loss` is
        [B] ([1] for [N, C]) or as `target` where the reduction says so.

    Raises:
        ValueError: as `efe_loss`.
    """
    plain = backend in ("auto", "cpp") and reduction == "mean" and not torch.compiler.is_compiling()
    if plain and DIRECT is not None:
        found = DIRECT(logits, target, class_weight, hard_floor, hard_mode, ignore_index)
        if found is not None:
            return EFEOutput._make(found)
    check_flat(logits, target)
    flat = logits.dim() == 2
    if class_weight is not None:
        check_float("class_weight", class_weight, (logits.shape[1],), "[C]", logits, grad=False)
    check_options(hard_floor, hard_mode, ignore_index)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    backend = resolve_backend(backend, logits, logits.shape[1])
    if checks.check_targets or (backend == "reference" and target.device.type == "cpu"):
        check_target_range(target, logits.shape[1], ignore_index)
    if reduction != "mean":
        # what one pass reports, without its graph; the loss then has torch's
        options: dict[str, Any] = {"class_weight": class_weight, "hard_mode": hard_mode, "ignore_index": ignore_index}
        out = hard_cell_cross_entropy(logits.detach(), target, hard_floor=hard_floor, backend=backend, **options)
        return out._replace(loss=_each(logits, target, out, hard_floor, reduction, **options))

    if backend == "cpp" and not torch.compiler.is_compiling() and not transforms.active():
        loss, ce, hard, accuracy, solved, predicted = torch.ops.qwen_fused.hard_cell_cross_entropy(
            logits, target, class_weight, hard_floor, HARD_MODE[hard_mode], ignore_index
        )
        return EFEOutput(loss, {"ce": ce, "hard": hard}, hard, accuracy, solved, predicted)

    plan = logits.t()[None, None, :, :, None] if flat else logits[:, None]
    cells = target[None, :, None] if flat else target
    inputs = {"plan": plan, "target": cells, **OTHERS, "class_weight": class_weight}
    if backend == "reference":
        out = EFEOutput(
            *run_reference(
                inputs,
                dict(zip(TERMS, WEIGHTS, strict=True)),
                hard_floor=hard_floor,
                hard_mode=hard_mode,
                ignore_index=ignore_index,
            )
        )
    else:
        loss, told, solved, predicted, *_ = run_op(
            backend, inputs, ON, WEIGHTS, hard_floor=hard_floor, hard_mode=hard_mode, ignore_index=ignore_index
        )
        hard = told[:, HARD]
        out = EFEOutput(loss, {"ce": told[:, CE], "hard": hard}, hard, told[:, ACCURACY], solved, predicted)
    return out._replace(predicted=out.predicted[0, :, 0]) if flat else out


def _each(
    logits: Tensor,
    target: Tensor,
    out: EFEOutput,
    hard_floor: float,
    reduction: str,
    *,
    class_weight: Tensor | None,
    hard_mode: str,
    ignore_index: int,
) -> Tensor:
    """The loss of each cell or episode, by the formulas of `qwen_fused.kernels.reference`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    target = target.long()
    valid = target != ignore_index
    inside = valid & (target >= 0) & (target < logits.shape[1])
    label = torch.where(inside, target, 0)
    weight = valid.to(wide.dtype)
    if class_weight is not None:
        weight = torch.where(valid, class_weight.to(wide.dtype)[label], 0.0)
    mass = weight
    if hard_mode == "cell":
        weight = torch.where(out.predicted == label, hard_floor * weight, weight)
    log_q = torch.where(valid.unsqueeze(1), wide, 0.0).log_softmax(1)
    nll = -log_q.gather(1, label.unsqueeze(1)).squeeze(1)
    # weight 0 drops the cell even where its target is forbidden and its cost infinite
    cells = torch.where(weight != 0, weight * nll, 0.0)
    # a class that does not exist must show
    cells = torch.where(valid & ~inside, torch.nan, cells)
    sigma = (
        hard_floor + (1 - hard_floor) * out.hard_ratio if hard_mode == "episode" else torch.ones_like(out.hard_ratio)
    )
    if logits.dim() == 2:
        cells, mass = cells[None], mass[None]
    cells = sigma.view(-1, *[1] * (cells.dim() - 1)) * cells
    if reduction == "none":
        return cells[0] if logits.dim() == 2 else cells
    share = mass.flatten(1).sum(1)
    return torch.where(share != 0, cells.flatten(1).sum(1) / torch.where(share != 0, share, 1.0), 0.0)
