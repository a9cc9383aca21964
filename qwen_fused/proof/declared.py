"""The first rung: every parameter is trainable, in train mode, and in exactly one optimizer group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qwen_fused.proof.by_design import frozen_by_peft, is_sinusoid
from qwen_fused.proof.ladder import Finding, Rung, name_some
from qwen_fused.proof.optimizers import groups_of
from qwen_fused.proof.subject import Subject
from qwen_fused.proof.unregistered import unregistered


def declared(subject: Subject, leaves: Sequence[Tensor] = ()) -> Rung:
    """Trainable, in train mode, and in exactly one optimizer group; and all that the loss trains is among them.

    Args:
        subject: what is proved.
        leaves: what else the loss depends on and asks for a gradient, in no module, parameter or optimizer given.
    """
    by_design = frozen_by_peft(subject.modules)
    named = {name: p for name, p in subject.named.items() if p.requires_grad or id(p) not in by_design}
    findings = []

    def find(kind: str, names: Iterable[str], sentence: str) -> None:
        names = [name for name in names if not subject.allow.name(name)]
        if names:
            findings.append(Finding(kind, f"{name_some(names)} {sentence}", tuple(names)))

    held = {id(p) for group in groups_of(subject.optimizers) for p in group["params"]}
    meant = _frozen_on_purpose(subject, named, held)
    frozen = [n for n, p in named.items() if not p.requires_grad and n not in meant]
    find("frozen", frozen, "asks for no gradient: requires_grad is False")
    find("not a leaf", [n for n, p in named.items() if not p.is_leaf], "is computed from others, so it gets no .grad")
    places: dict[int, int] = defaultdict(int)
    for group in groups_of(subject.optimizers):
        for parameter in group["params"]:
            places[id(parameter)] += 1
    if subject.optimizers:
        owned = {name: places[id(p)] for name, p in named.items() if p.requires_grad}
        find("not in the optimizer", [n for n, k in owned.items() if k == 0], "is in no group: it never moves")
        find("in two groups", [n for n, k in owned.items() if k > 1], "is in several groups: it steps more than once")
    findings += _evaluating(subject) + unregistered(subject, leaves)
    if not named:
        return Rung("declared", None, "no parameters were given")
    detail = f"{len(named) - len(meant)} parameters, trainable"
    detail += f", {len(meant)} frozen on purpose" if meant else ""
    detail += f", {len(subject.named) - len(named)} frozen by peft" if len(named) < len(subject.named) else ""
    detail += ", in train mode" if subject.modules else ", mode not judged (no module was given)"
    detail += ", each in one optimizer group" if subject.optimizers else ", groups not judged (no optimizer was given)"
    return Rung("declared", not findings, detail if not findings else name_some([f.kind for f in findings]), findings)


def _frozen_on_purpose(subject: Subject, named: Mapping[str, Tensor], held: Collection[int]) -> set[str]:
    """Parameters that are frozen and that no optimizer holds, and tables of sinusoids whoever holds them."""
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if len(frozen) == len(named):
        return set()
    moving = [name for name in frozen if name in subject.moving]
    alone = [name for name in frozen if name not in moving and subject.optimizers and id(named[name]) not in held]
    tables = [name for name in frozen if name not in (*moving, *alone) and is_sinusoid(named[name])]
    if moving:
        subject.notes.append(f"{name_some(moving)} is frozen, and moved by the loop itself")
    if alone:
        subject.notes.append(f"{name_some(alone)} is frozen, and no optimizer holds it")
    if tables:
        subject.notes.append(f"{name_some(tables)} is a frozen table of sinusoids")
    return {*moving, *alone, *tables}


def _evaluating(subject: Subject) -> list[Finding]:
    """Modules in evaluation mode, the outermost ones, with the trainable parameters in them."""
    found: list[tuple[str, nn.Module]] = []
    # frozen parts with all that is in them, dropout without a parameter of its own too
    resting: list[str] = []
    for root, module in subject.modules.items():
        for name, part in module.named_modules(prefix=root):
            outside = [*(outer for outer, _ in found), *resting]
            inside = any(name.startswith(f"{outer}.") or outer == "" for outer in outside)
            asleep = not part.training and not inside
            idle = any(True for _ in part.parameters()) and not any(p.requires_grad for p in part.parameters())
            if asleep and idle:
                resting.append(name)
            elif asleep and not subject.allow.name(name):
                found.append((name, part))
    names = {id(p): name for name, p in subject.named.items()}
    norms = [name or type(part).__name__ for name, part in found if isinstance(part, _NormBase)]
    if norms and subject.modules and any(m.training for m in subject.modules.values()):
        subject.notes.append(f"{name_some(norms)} keeps its batch statistics: it is in evaluation mode on purpose")
        found = [(name, part) for name, part in found if not isinstance(part, _NormBase)]
    return [
        Finding(
            "eval mode",
            f"{name or type(part).__name__} is in evaluation mode: no dropout, no batch statistics",
            tuple(names[id(p)] for p in part.parameters() if p.requires_grad and id(p) in names),
        )
        for name, part in found
    ]
