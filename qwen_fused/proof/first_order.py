"""Whether the loss follows a step d as its gradient says: L(p + f d) - L(p) against f <g, d>, for a part f of it.

A step is often so long that the loss bends on the way. So a tenth of it is looked at, a hundredth, and so on, in
float64 where the code allows it: the largest part along which first order holds is told, and if there is none down to a
millionth, the step does not follow the gradient of this loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.moves import Moves
from qwen_fused.proof.real_parts import inner
from qwen_fused.proof.replay import Held, ReplayMismatch
from qwen_fused.proof.slots import Slot
from qwen_fused.proof.subject import Gradients, Subject
from qwen_fused.proof.trusted_ops import Linearized

# parts of the step, and how closely first order must hold along one of them
PARTS = tuple(10.0**-power for power in range(7))
CLOSE = (0.5, 2.0)
# the predicted change over what the loss is rounded to, from which on it can be told from rounding
TOLD_APART = 100
# <g, d> over |g| |d| below which the step is across the gradient, and first order says nothing
ACROSS = 1e-7


@dataclass
class FirstOrder:
    """The loss's change beside what its gradient says.

    Args:
        predicted: <g, d>, for the whole step.
        actual: the loss's change over the whole step.
        part: the largest part of the step along which first order holds; 0 when there is none; None when it can't be
            told.
        part_predicted, part_actual: the two changes over that part, or over the smallest part looked at.
        reason: why it can't be told.
        nondeterminism: by how much the loss differs between two calls that should be the same.
    """

    predicted: float = 0.0
    actual: float = 0.0
    part: float | None = None
    part_predicted: float = 0.0
    part_actual: float = 0.0
    reason: str = ""
    nondeterminism: float = 0.0


def measure(
    subject: Subject,
    gradients: Gradients,
    changes: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    loss: float,
    trace: Trace,
    linearized: Linearized,
) -> FirstOrder:
    """Measure a step's effect on the loss.

    Args:
        subject: what is proved, its parameters where the step began.
        gradients: of the loss there.
        changes: name -> what the step added to the parameter.
        before: name -> the parameter there.
        loss: there.
        trace: the call that the gradients are of.
        linearized: its operations that are taken at their word.
    """
    # what the loss function writes to itself it can't be said to follow
    written = set(trace.labels.names_of(trace.rewritten))
    changes = {name: change for name, change in changes.items() if name not in written}
    slopes = gradients.before_changes()
    found = FirstOrder(predicted=sum(inner(slopes[name], change) for name, change in changes.items()))
    moved = {name: subject.named[name] for name in changes}
    held: dict[Slot, Held] = {**trace.held(carried=subject.own_backward), **linearized}
    own = Moves(moved, lambda _: subject.value(), None, before)
    whole = dict.fromkeys(changes, 1.0)
    found.actual = own.loss_at(1.0, changes, whole) - loss
    own.restore()
    found.nondeterminism = abs(subject.value() - loss)
    rounding = 4 * float(torch.finfo(_coarsest(subject, trace)).eps) * abs(loss) + 20 * found.nondeterminism
    size = sum(inner(slopes[n], slopes[n]) for n in changes) ** 0.5
    size *= sum(inner(change, change) for change in changes.values()) ** 0.5
    if trace.exchanges:
        found.reason = "the loss is computed by several processes together"
        return found
    if not abs(found.predicted) > ACROSS * size:
        return found
    if (
        not held
        and not trace.half
        and abs(found.predicted) > TOLD_APART * rounding
        and _is_close(found, 1.0, found.actual)
    ):
        return found
    _look_along(subject, found, moved, changes, before, held, trace, rounding, loss)
    return found


def _look_along(
    subject: Subject,
    found: FirstOrder,
    moved: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    held: Mapping[Slot, Held],
    trace: Trace,
    rounding: float,
    loss: float,
) -> None:
    """Try smaller and smaller parts of the step, in float64 if that can be, else down to what rounding hides."""
    whole = dict.fromkeys(changes, 1.0)
    # where the change is no matter of rounding its own precision is enough, and quicker
    types: tuple[torch.dtype | None, ...] = (torch.float64, None) if trace.half else (None, torch.float64)
    # the whole step of a loss in which nothing is held still has been looked at
    parts = PARTS if held or trace.half else PARTS[1:]
    for wide in types:
        moves = Moves(moved, subject.evaluation(trace, held, wide), wide, before)
        try:
            here = moves.loss_at(0.0, {}, {}) if wide or held else loss
            if abs(here - loss) > 0.05 * abs(loss) + 1e-6:
                # other draws, or code that is another in float64
                found.reason = "the loss is another when it is computed in float64"
                continue
            noise = rounding
            if wide:
                noise = 4 * float(torch.finfo(torch.float64).eps) * abs(here) + 20 * found.nondeterminism
            for part in parts:
                if abs(part * found.predicted) <= TOLD_APART * noise:
                    break
                if _is_close(found, part, moves.loss_at(part, changes, whole) - here):
                    return
            if found.part is not None and wide:
                return
            found.reason = "the change is lost in the loss's rounding"
        except ReplayMismatch as error:
            found.reason = f"the loss function does not make the same calls twice: {error}"
        except Exception as error:
            # some code insists on its own type, and says so in its own way; the model's own precision is still to come
            found.reason = str(error).partition("\n")[0]


def _is_close(found: FirstOrder, part: float, actual: float) -> bool:
    found.part_predicted, found.part_actual = part * found.predicted, actual
    close = CLOSE[0] <= actual / found.part_predicted <= CLOSE[1]
    found.part = part if close else 0.0
    return close


def _coarsest(subject: Subject, trace: Trace) -> torch.dtype:
    types = [torch.bfloat16] if trace.half else [p.dtype for p in subject.trainable.values()]
    return max(types, key=lambda dtype: torch.finfo(dtype).eps)
