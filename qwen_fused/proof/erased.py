"""A gradient that backward delivered and that is gone when the optimizer comes to use it: the line that erased it."""

from __future__ import annotations

from qwen_fused.proof.changing_line import changing_line
from qwen_fused.proof.frames import of_function
from qwen_fused.proof.hooks import hooks_of
from qwen_fused.proof.ladder import Finding, name_some
from qwen_fused.proof.subject import Subject


def erased(subject: Subject, names: tuple[str, ...], during_step: bool) -> Finding:
    """Name the line that erased gradients, or the hook that may have."""
    watched = subject.named[names[0]]
    frame = changing_line(subject, watched, lambda before, after: before > 0 and after == 0, during_step)
    hooks = hooks_of(watched) if not during_step else []
    if frame is None and hooks:
        frame = of_function(hooks[-1])
    when = "between backward and the optimizer's step" if during_step else "before backward was done"
    return Finding("erased", f"the gradient of {name_some(names)} is erased {when}", names, frame)
