"""A backward pass that raises: the operation whose backward it was, found by torch's anomaly mode."""

from __future__ import annotations

import warnings

import torch

from qwen_fused.proof import frames, modes
from qwen_fused.proof.frames import NOWHERE, Site
from qwen_fused.proof.subject import Subject

# how torch begins what it tells, with the traceback of the forward call after it
_TOLD = "Error detected in "


def reason_of(error: BaseException) -> str:
    """What was raised, in one line, without torch's advice on how to look for it."""
    text = str(error).strip()
    return text.splitlines()[0].partition(" Hint:")[0] if text else type(error).__name__


def failing_call(subject: Subject) -> Site:
    """Where the operation was called whose backward raises; NOWHERE where torch does not know it."""
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True, check_nan=False):
        warnings.simplefilter("always")
        with modes.uncompiled():
            subject.gradients(subject.call())
    subject.snapshot.clear_gradients()
    for warning in told:
        text = str(warning.message)
        if text.startswith(_TOLD) and (found := frames.of_traceback(text.splitlines())) != NOWHERE:
            return found
    return NOWHERE
