"""A gradient that disagrees with the loss: the operation, the hook or the parameters to blame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qwen_fused.proof.checkpoints import without_checkpoints
from qwen_fused.proof.derivative import Directions
from qwen_fused.proof.frames import Frame, of_function
from qwen_fused.proof.hooks import hook_to_blame
from qwen_fused.proof.ladder import Finding, name_some
from qwen_fused.proof.real_parts import inner
from qwen_fused.proof.subject import Subject
from qwen_fused.proof.trusted_ops import Point, wrong_ops
from qwen_fused.proof.verdict import Verdict

# parts of a model that are moved one by one to find the wrong ones
SEARCHED = 24


def find_wrong_backward(subject: Subject, point: Point, lines: Directions, verdicts: list[Verdict]) -> list[Finding]:
    """Name what makes a gradient wrong: an erasure, a custom operation, a hook; else the layers concerned."""
    trace, judged = point.trace, lines.gradients
    if point.gradients.erased_at is not None:
        site = point.gradients.erased_at
        detail = "gradients that backward had delivered are set to zero again before it is done: what is left is a part"
        return [Finding("erased", detail, tuple(judged), site.user, site.inside)]
    findings = []
    for op, said in wrong_ops(subject):
        names = tuple(n for n in trace.labels.names_of(op.inputs) if n in judged)
        findings.append(Finding("wrong", f"the backward of {op.name} is {said}", names, op.site.user, op.site.inside))
    if findings:
        return findings
    lines.restore()
    kept, segments = without_checkpoints(subject)
    if kept is not None and _differ(kept.of, point, judged):
        names = tuple(name for name in judged if _differs(kept.of.get(name), point.gradients.of[name]))
        detail = f"the gradient of {name_some(names)} is another without checkpointing: what the segment computes "
        detail += "when backward runs it again is not what it had computed (other random numbers, or a state gone on)"
        return [Finding("wrong", detail, names, segments[0].user, segments[0].inside)]
    ratios = [verdict.ratio for verdict in verdicts if verdict.ok is False]
    # of a loss that does not move at all nothing is a multiple
    uniform = len(ratios) > 1 and all(abs(r - ratios[0]) < 0.02 * abs(ratios[0]) for r in ratios)
    names = tuple(_narrowed(lines, list(judged)))
    # alike by accident is not alike: most of them must be wrong by themselves
    uniform = uniform and 2 * len(names) > len(judged)
    names = tuple(judged) if uniform else names
    detail = f"the loss's own derivative disagrees for {name_some(names)}"
    if found := _module_hook(subject, point, judged):
        return [Finding("wrong", f"{detail}; {found[0]} changes it", names, found[1])]
    if trace.hooks and (hook := hook_to_blame(subject, lambda found: _differ(found.of, point, judged))):
        detail += f"; {hook.name}, registered here, changes a gradient"
        return [Finding("wrong", detail, names, hook.site.user, hook.site.inside)]
    for event in trace.cuts:
        if event.aliased and event.lost:
            detail += "; a value that backward may need is written to through this, behind autograd's back"
            return [Finding("wrong", detail, names, event.site.user, event.site.inside)]
    if uniform:
        detail = f"every gradient is {1 / ratios[0]:.3g} times the loss's derivative: is it scaled before backward?"
    else:
        detail += "; no custom operation or hook was found to blame"
    return [Finding("wrong", detail, names)]


def _narrowed(lines: Directions, names: list[str]) -> list[str]:
    """The wrong ones among parameters, part by part of the model, as far down as some of a part's parts are right."""
    parts: dict[str, list[str]] = {}
    split = [name.split(".") for name in names]
    depth = next((d for d in range(min(map(len, split))) if len({s[d] for s in split}) > 1), None)
    for name, pieces in zip(names, split, strict=True):
        parts.setdefault(name if depth is None else pieces[depth], []).append(name)
    if not 1 < len(parts) <= SEARCHED:
        return names
    wrong = lines.wrong_among(parts)
    if not wrong or len(wrong) == len(parts):
        return names
    return [name for part in wrong for name in _narrowed(lines, parts[part])]


def _module_hook(subject: Subject, point: Point, judged: Mapping[str, Tensor]) -> tuple[str, Frame | None] | None:
    """A backward hook of a module without which the gradients are others: where it was defined."""
    for root, module in subject.modules.items():
        for name, part in module.named_modules(prefix=root):
            for registry in (part._backward_hooks, part._backward_pre_hooks):
                for key, hook in list(registry.items()):
                    with _without(registry, key):
                        gradients = subject.gradients(subject.call()).of
                    if _differ(gradients, point, judged):
                        return f"a backward hook on {name or type(part).__name__}", of_function(hook)
    return None


@contextmanager
def _without(registry: dict[int, Any], key: int) -> Iterator[None]:
    held = dict(registry)
    del registry[key]
    try:
        yield
    finally:
        registry.clear()
        registry.update(held)


def _differ(gradients: Mapping[str, Tensor], point: Point, judged: Mapping[str, Tensor]) -> bool:
    """Whether any of the judged parameters has another gradient than at the point."""
    return any(_differs(gradients.get(n), g) for n, g in point.gradients.of.items() if n in judged)


def _differs(one: Tensor | None, other: Tensor) -> bool:
    if one is None:
        return True
    size = inner(other, other)
    return inner(one - other, one - other) > 1e-6 * size if size else bool(one.any())
