"""The first rung: every parameter is trainable, in train mode, and in exactly one optimizer group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.subject import Subject, frozen_by_peft


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
