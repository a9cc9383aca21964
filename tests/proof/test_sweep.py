"""Healthy loops by the hundred: none is called broken, none crashes the proof. Minutes; run with -m slow."""

from __future__ import annotations

import pytest
from proof_sweep import loops

from qwen_fused.proof.prove import prove

LOOPS = loops()


def test_there_are_more_than_a_hundred():
    assert len(LOOPS) > 150 and len({name for name, _, _ in LOOPS}) == len(LOOPS)


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop[0])
def test_loop_is_proved(loop):
    name, library, build = loop
    pytest.importorskip(library)
    report = prove(**build())
    assert report.verdict == "proved", f"{name}: {report}"


# a part of them in every run, one of each kind
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop[1] == "torch"], ids=lambda loop: loop[0])
def test_plain_torch_is_proved(loop):
    report = prove(**loop[2]())
    assert report.verdict == "proved", f"{loop[0]}: {report}"
