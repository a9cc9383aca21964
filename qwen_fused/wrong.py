"""The fourth rung: autograd's derivative is the loss's own along random directions; if not, whose backward is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen_fused import derivative
from qwen_fused.cuts import CustomOp, Trace
from qwen_fused.derivative import Directions, Verdict
from qwen_fused.frames import of_function
from qwen_fused.labels import tensors_in
from qwen_fused.ladder import Finding, Rung, group_by_layer, name_some
from qwen_fused.replay import Held, ReplayMismatch, Slot, Wide, replace_tensors
from qwen_fused.subject import Gradients, Subject, as_float

# what float64 shows and nothing explains must show in the model's own precision too
DOUBT = "in float64"
# parameters beyond which a second copy in float64 is too much to ask
MOST_IN_FLOAT64 = 500_000_000


class Surrogate:
    """Stands in for a custom operation whose own backward the caller vouches for.

    At each evaluation its result is the recorded one plus what its backward says of the change of its inputs, so that
    the finite difference tests everything around it and takes the operation itself at its word.
    """

    def __init__(self, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any):
        self.call = call
        self.given = [t.detach().clone() for t in tensors_in((args, kwargs))]
        self.arguments = args, kwargs
        self.results = {place: t.detach().clone() for place, t in enumerate(tensors_in(out)) if t.requires_grad}
        self.upstream: dict[int, Tensor] = {}
        self.slopes: dict[int, Tensor] = {}
        for place, tensor in enumerate(tensors_in(out)):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad, place=place: self.upstream.__setitem__(place, grad.detach()))

    def finish(self) -> None:
        """Once the backward pass has been: ask the operation's backward for its slopes."""
        inputs = {
            place: tensor.clone().requires_grad_()
            for place, tensor in enumerate(self.given)
            if tensor.is_floating_point()
        }
        args, kwargs = replace_tensors(self.arguments, dict(enumerate(self.given)) | inputs)
        with torch.enable_grad():
            outs = dict(enumerate(tensors_in(self.call(*args, **kwargs))))
        used = [place for place in self.upstream if outs[place].requires_grad]
        if used:
            grads = torch.autograd.grad(
                [outs[p] for p in used], list(inputs.values()), [self.upstream[p] for p in used], allow_unused=True
            )
            self.slopes = {place: g for place, g in zip(inputs, grads, strict=True) if g is not None}
        self.arguments = ((), {})

    def put(self, ins: list[Tensor], out: Any) -> Any:
        """The recorded result plus the first-order change, along the direction that the loss is sensitive to."""
        change = sum(_inner(g, ins[p].detach() - self.given[p]) for p, g in self.slopes.items())
        size = sum(_inner(u, u) for u in self.upstream.values())
        moved = {}
        for place, value in self.results.items():
            upstream = self.upstream.get(place)
            share = 0.0 if upstream is None or not size else change / size
            moved[place] = value if upstream is None else value + (share * upstream).to(value.dtype)
        return replace_tensors(out, moved)


def correct(
    subject: Subject,
    trace: Trace,
    gradients: Gradients,
    loss: Any,
    surrogates: Mapping[Slot, Surrogate],
    directions: int,
    seed: int,
) -> Rung:
    """Judge the gradients taken at the present point along random directions.

    Args:
        subject: what is proved, its parameters where the gradients were taken.
        trace: the call that the gradients are of.
        gradients: of that call.
        loss: of that call.
        surrogates: custom operations to take at their word.
        directions: how many.
        seed: for the directions.
    """
    if not gradients.of or not isinstance(loss, Tensor):
        return Rung("correct", None, "there is no gradient to judge")
    held: dict[Slot, Held] = {**trace.held(carried=subject.own_backward), **surrogates}
    for surrogate in surrogates.values():
        surrogate.finish()
    value = as_float(loss)
    try:
        again = subject.value(held)
    except ReplayMismatch as error:
        return Rung("correct", None, f"the loss function does not make the same calls twice: {error}")
    wobble = abs(again - value)
    if not wobble <= 1e-2 * abs(value) + 1e-12:
        detail = f"the loss is {value:.6g}, then {again:.6g} with the same parameters and random state: not repeatable"
        return Rung("correct", None, "the loss is not finite" if math.isnan(wobble) else detail)
    stale = {name for label, _ in trace.stale for name in trace.labels.names_of(label)}
    judged = {name: g for name, g in gradients.of.items() if name not in stale}
    types = {p.dtype for p in subject.trainable.values()} | {loss.dtype}
    coarse = torch.bfloat16 if trace.half else min(types, key=lambda t: torch.finfo(t).bits)
    rung, doubt = Rung("correct", None, ""), None
    for wide in _types(subject, coarse):
        lines = Directions(subject.trainable, judged, _evaluation(subject, held, wide), coarse, wide, seed)
        try:
            if wide is not None and not _agrees(lines, value, coarse):
                continue
            verdicts = [lines.check(n, wobble) for n in range(directions)]
            rung = _judge(subject, trace, lines, verdicts, wobble, doubt)
        except ReplayMismatch as error:
            rung.detail = f"the loss function does not make the same calls twice: {error}"
        finally:
            lines.restore()
        if rung.ok is not None:
            break
        doubt = rung.detail if rung.detail.startswith(DOUBT) else None
    return rung


def _types(subject: Subject, coarse: torch.dtype) -> list[torch.dtype | None]:
    """Types to evaluate in, the best first; None is the model's own."""
    if coarse == torch.float64:
        return [None]
    room = sum(p.numel() for p in subject.snapshot.parameters) <= MOST_IN_FLOAT64
    return [*((torch.float64,) if room else ()), *((torch.float32,) if coarse != torch.float32 else ()), None]


def _evaluation(
    subject: Subject, held: Mapping[Slot, Held], wide: torch.dtype | None
) -> Callable[[Mapping[int, Tensor] | None], float]:
    return lambda values: subject.value(held, None if wide is None else Wide(wide, values or {}))


def _agrees(lines: Directions, value: float, coarse: torch.dtype) -> bool:
    """Whether the loss can be computed in the wider type, and is the same loss: other draws would give another."""
    allowed = {torch.float32: 3e-5}.get(coarse, 5e-2)
    try:
        return abs(lines.here() - value) <= allowed * abs(value) + 1e-6
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError):
        # some code insists on its own type
        return False


def _judge(
    subject: Subject, trace: Trace, lines: Directions, verdicts: list[Verdict], wobble: float, doubt: str | None
) -> Rung:
    judged = lines.gradients
    if all(verdict.ok for verdict in verdicts):
        # what weighs too little beside the others is moved alone
        small = [n for n in judged if all(abs(v.shares.get(n, 0.0)) < v.resolution for v in verdicts)]
        if small and len(small) < len(judged) and lines.wide is None:
            alone = lines.check(0, wobble, only=small)
            verdicts += [alone] if alone.ok is not None else []
    if any(verdict.ok is False for verdict in verdicts):
        worst = max((v for v in verdicts if v.ok is False), key=lambda v: abs(v.deviation))
        findings = _guilty(subject, trace, lines, judged, worst)
        detail = f"autograd's derivative is off by {abs(worst.deviation):.1%} of its scale"
        if lines.wide and all(finding.frame is None for finding in findings):
            return Rung("correct", None, f"{DOUBT} {detail}, which the model's own precision can't tell from none")
        return Rung("correct", False, detail, findings)
    if doubt is not None:
        return Rung("correct", None, doubt)
    unsure = [verdict.reason for verdict in verdicts if verdict.ok is None]
    if unsure:
        return Rung("correct", None, unsure[0])
    deviation = max(abs(verdict.deviation) for verdict in verdicts)
    resolution = max(verdict.resolution for verdict in verdicts)
    where = "float64" if lines.wide else "the model's own precision"
    detail = f"{len(verdicts)} directions agree with finite differences in {where} to {deviation:.0e}"
    detail += f" (resolved {resolution:.0e})"
    # a share below the resolution could be wrong by its whole size unseen
    small = [name for name in judged if all(abs(v.shares.get(name, 0.0)) < v.resolution for v in verdicts)]
    detail += f"; {len(small)} of {len(judged)} parameters too small to tell" if small else ""
    return Rung("correct", True, detail)


def _guilty(
    subject: Subject, trace: Trace, lines: Directions, judged: Mapping[str, Tensor], worst: Verdict
) -> list[Finding]:
    """Name the custom operation whose backward disagrees with its forward; else a hook; else the layers concerned."""
    findings = []
    for op, ratio in wrong_ops(subject):
        names = tuple(n for n in trace.labels.names_of(op.inputs) if n in judged)
        detail = f"the backward of {op.name} is {ratio} its forward's derivative"
        findings.append(Finding("wrong", detail, names, op.site.user, op.site.inside))
    if findings:
        return findings
    lines.restore()
    groups = group_by_layer(judged, most=12)
    wrong = lines.wrong_among(groups) or list(groups)
    names = tuple(name for group in wrong for name in groups[group])
    ratio = f" ({worst.ratio:.4g} times autograd's)" if len(wrong) == len(groups) else ""
    detail = f"the loss's own derivative{ratio} disagrees for {name_some(wrong)}"
    for name in names:
        for hook in [*(judged_hooks(subject.named[name]))]:
            where = of_function(hook)
            findings.append(Finding("wrong", f"a hook on {name} changes its gradient", names, where))
            return findings
    if trace.hooks:
        site = trace.hooks[0]
        return [Finding("wrong", f"{detail}; a hook registered here changes a gradient", names, site.user, site.inside)]
    for event in trace.cuts:
        if event.aliased and event.lost:
            user = event.site.user
            detail += "; a value that backward may need is written to through this, behind autograd's back"
            return [Finding("wrong", detail, names, user, event.site.inside)]
    return [Finding("wrong", f"{detail}; no custom operation or hook was found to blame", names)]


def judged_hooks(parameter: Tensor) -> list[Callable[..., Any]]:
    """Hooks that may change a parameter's gradient."""
    return [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]


def wrong_ops(subject: Subject) -> list[tuple[CustomOp, str]]:
    """Custom operations, one call per line of source, whose backward is not the derivative of their forward."""
    calls: dict[Any, tuple[CustomOp, Callable[..., Any], Any]] = {}

    def keep(op: CustomOp, call: Callable[..., Any], args: tuple, kwargs: dict, out: Any) -> None:
        if not subject.allow.custom(op.name, op.site.callers):
            calls.setdefault((op.name, op.site.user), (op, call, _detached((args, kwargs))))

    subject.trace(keep)
    found = []
    for op, call, (args, kwargs) in calls.values():
        ratio = _local_ratio(call, args, kwargs)
        if ratio is not None and abs(ratio - 1) > 5 * derivative.TOLERANCE[torch.float32]:
            found.append((op, f"{ratio:.4g} times"))
    return found


def _detached(arguments: Any) -> Any:
    tensors = list(tensors_in(arguments))
    return replace_tensors(arguments, {place: t.detach().clone() for place, t in enumerate(tensors)})


def _local_ratio(call: Callable[..., Any], args: tuple, kwargs: dict) -> float | None:
    """Backward's over forward's derivative of one operation alone, along a random direction; None if there is none."""
    for dtype, step in ((torch.float64, 1e-5), (None, 1e-2)):
        try:
            slope, slopes = _local_slopes(call, args, kwargs, dtype, step)
        except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError):
            # the operation insists on its own type
            continue
        measured = (4 * slopes[1] - slopes[0]) / 3
        size = max(abs(slope), abs(measured))
        if size and abs(slopes[0] - slopes[1]) <= 0.1 * size:
            return slope / measured if measured else float("inf")
    return None


def _local_slopes(
    call: Callable[..., Any], args: tuple, kwargs: dict, dtype: torch.dtype | None, step: float
) -> tuple[float, list[float]]:
    """Autograd's derivative of a random sum of the results along a random direction, and two measured ones."""
    tensors = list(tensors_in((args, kwargs)))
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

    inputs = {p: t.to(dtype or t.dtype) for p, t in enumerate(tensors) if t.is_floating_point() and t.numel()}
    directions = {place: noise(t) * t.float().square().mean().sqrt().clamp(min=1e-3) for place, t in inputs.items()}
    weights: dict[int, Tensor] = {}

    def run(shift: float, with_grad: bool = False) -> tuple[Tensor, list[Tensor]]:
        moved = {p: (t + shift * directions[p]).requires_grad_(with_grad) for p, t in inputs.items()}
        given = replace_tensors((args, kwargs), {p: moved.get(p, t.clone()) for p, t in enumerate(tensors)})
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(with_grad):
            torch.manual_seed(0)
            outs = [t for t in tensors_in(call(*given[0], **given[1])) if t.is_floating_point()]
        for place, out in enumerate(outs):
            weights.setdefault(place, noise(out))
        total = sum(((weights[p] * out).sum(dtype=torch.float64) for p, out in enumerate(outs)), torch.zeros(()))
        return total, list(moved.values())

    total, leaves = run(0.0, with_grad=True)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    slope = sum(_inner(g, d) for g, d in zip(grads, directions.values(), strict=True) if g is not None)
    return slope, [float((run(h)[0] - run(-h)[0]) / (2 * h)) for h in (step, step / 2)]


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())
