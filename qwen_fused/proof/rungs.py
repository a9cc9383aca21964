"""The first three rungs: what is declared, what backward delivers to, which gradients are finite and not zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_fused.proof import explain
from qwen_fused.proof.cuts import Cut, Trace
from qwen_fused.proof.ladder import Finding, Rung, group_by_layer, name_some
from qwen_fused.proof.subject import Gradients, Subject, frozen_by_peft


def declared(subject: Subject) -> Rung:
    """Trainable, in train mode, and in exactly one optimizer group."""
    by_design = frozen_by_peft(subject.modules)
    named = {name: p for name, p in subject.named.items() if p.requires_grad or id(p) not in by_design}
    findings = []

    def find(kind: str, names: Iterable[str], sentence: str) -> None:
        names = [name for name in names if not subject.allow.name(name)]
        if names:
            findings.append(Finding(kind, f"{name_some(names)} {sentence}", tuple(names)))

    find("frozen", [n for n, p in named.items() if not p.requires_grad], "asks for no gradient: requires_grad is False")
    find("not a leaf", [n for n, p in named.items() if not p.is_leaf], "is computed from others, so it gets no .grad")
    places: dict[int, int] = defaultdict(int)
    for optimizer in subject.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                places[id(parameter)] += 1
    if subject.optimizers:
        owned = {name: places[id(p)] for name, p in named.items() if p.requires_grad}
        find("not in the optimizer", [n for n, k in owned.items() if k == 0], "is in no group: it never moves")
        find("in two groups", [n for n, k in owned.items() if k > 1], "is in several groups: it steps more than once")
    findings += _evaluating(subject)
    if not named:
        return Rung("declared", None, "no parameters were given")
    detail = f"{len(named)} parameters, trainable"
    detail += f", {len(subject.named) - len(named)} frozen by peft" if len(named) < len(subject.named) else ""
    detail += ", in train mode" if subject.modules else ", mode not judged (no module was given)"
    detail += ", each in one optimizer group" if subject.optimizers else ", groups not judged (no optimizer was given)"
    return Rung("declared", not findings, detail if not findings else name_some([f.kind for f in findings]), findings)


def _evaluating(subject: Subject) -> list[Finding]:
    """Modules in evaluation mode, the outermost ones, with the trainable parameters in them."""
    found: list[tuple[str, nn.Module]] = []
    for root, module in subject.modules.items():
        for name, part in module.named_modules(prefix=root):
            inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found)
            asleep = not part.training and not inside
            idle = any(True for _ in part.parameters()) and not any(p.requires_grad for p in part.parameters())
            if asleep and not idle and not subject.allow.name(name):
                found.append((name, part))
    names = {id(p): name for name, p in subject.named.items()}
    return [
        Finding(
            "eval mode",
            f"{name or type(part).__name__} is in evaluation mode: no dropout, no batch statistics",
            tuple(names[id(p)] for p in part.parameters() if p.requires_grad and id(p) in names),
        )
        for name, part in found
    ]


def connected(subject: Subject, trace: Trace, gradients: Gradients) -> tuple[Rung, Cut | None]:
    """Every parameter is given a gradient; if not, the operation that loses it."""
    if gradients.error is not None:
        reason = str(gradients.error).splitlines()[0]
        # with a graph left over from an earlier call, that is the fault, and the last rung's
        findings = [] if trace.stale else [Finding("backward failed", reason, tuple(subject.trainable))]
        return Rung("connected", False if findings else None, f"backward raised: {reason}", findings), None
    trainable = subject.trainable
    missing = [n for n in trainable if n not in gradients.of and not subject.allow.name(n)]
    if not trainable:
        return Rung("connected", None, "no parameter asks for a gradient"), None
    if not missing:
        return Rung("connected", True, f"backward delivers to {len(gradients.of)} of {len(trainable)} parameters"), None
    findings, cuts = explain.disconnected(subject, trace, missing)
    detail = f"{len(missing)} of {len(trainable)} parameters get no gradient: {name_some(missing)}"
    return Rung("connected", False, detail, findings), cuts[0] if cuts else None


def nonzero(subject: Subject, gradients: Gradients, later: Mapping[str, Tensor], loss: Any) -> Rung:
    """Every gradient is finite and, there or one small step away, not all zero."""
    if not gradients.of:
        return Rung("nonzero", None, "there is no gradient to look at")
    finite = torch.stack([g.isfinite().all().cpu() for g in gradients.of.values()]).tolist()
    bad = tuple(name for name, whole in zip(gradients.of, finite, strict=True) if not whole)
    zero = [n for n in zeros(gradients.of) if not subject.allow.name(n)]
    dead = tuple(n for n in zero if n not in later or not later[n].any())
    findings = []
    if bad:
        findings += explain.nonfinite(subject, bad, loss)
    if dead:
        findings += explain.zero(subject, dead)
    if findings:
        detail = f"{len(bad)} not finite, {len(dead)} zero of {len(gradients.of)} gradients"
        return Rung("nonzero", False, detail, findings)
    woken = [n for n in zero if n not in dead]
    detail = f"{len(gradients.of)} gradients, all finite"
    detail += f"; {len(woken)} zero now but not one step on ({name_some(woken, 1)})" if woken else ", none zero"
    return Rung("nonzero", True, detail)


def zeros(gradients: Mapping[str, Tensor]) -> list[str]:
    """Names of the gradients whose every element is zero."""
    if not gradients:
        return []
    alive = torch.stack([g.any().cpu() for g in gradients.values()]).tolist()
    return [name for name, some in zip(gradients, alive, strict=True) if not some]


def layers(gradients: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Per layer: parameters, gradient norm, largest element, and tensors that are zero or not finite."""
    rows = []
    for layer, names in group_by_layer(gradients).items():
        grads = [gradients[name].float() for name in names]
        largest = torch.stack([g.abs().max() if g.numel() else g.new_zeros(()) for g in grads])
        rows.append(
            {
                "layer": layer,
                "parameters": len(names),
                "norm": torch.stack([g.norm() for g in grads]).norm().item(),
                "max_abs": largest.max().item(),
                "zero": len(zeros({name: gradients[name] for name in names})),
                "nonfinite": sum(not bool(g.isfinite().all()) for g in grads),
            }
        )
    return rows
