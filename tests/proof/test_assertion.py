"""qwen_fused.testing.assert_gradient: passes where the gradient is whole, fails with the ladder where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from proof_cases import Pair, X, Y, marked

import qwen_fused as qf

pytest_plugins = "pytester"


def detach(hidden):
    return hidden.detach()  # here


def test_whole_gradient() -> None:
    model = Pair()
    report = qf.testing.assert_gradient(lambda: F.cross_entropy(model(X), Y), model)
    assert report.ok and report.rungs["applied"].asked is False
    report = qf.testing.assert_gradient(
        lambda: F.cross_entropy(model(X), Y), model, torch.optim.SGD(model.parameters(), lr=0.1), directions=1
    )
    assert report.rungs["applied"].ok


def test_cut_gradient_fails_with_the_ladder() -> None:
    model = Pair(detach)
    with pytest.raises(AssertionError) as failed:
        qf.testing.assert_gradient(lambda: F.cross_entropy(model(X), Y), model)
    assert "2 connected BROKEN" in str(failed.value)
    assert f"test_assertion.py:{marked(detach)} in detach" in str(failed.value)
    assert qf.testing.assert_gradient(lambda: F.cross_entropy(model(X), Y), model, allow=["encoder.*", "detach"]).ok


def test_what_can_not_be_judged_does_not_pass() -> None:
    model = Pair()
    model.requires_grad_(False)
    with pytest.raises(AssertionError, match="gradient (broken|not proved)"):
        qf.testing.assert_gradient(lambda: F.cross_entropy(model(X), Y), model)


def test_in_a_test_of_somebody_elses(pytester) -> None:
    pytester.makepyfile(
        test_theirs="""
        import qwen_fused as qf
        import torch
        from torch import nn

        def test_gradient():
            first, second = nn.Linear(4, 4), nn.Linear(4, 1)
            x = torch.randn(8, 4)
            qf.testing.assert_gradient(
                lambda: second(first(x).detach()).square().mean(), nn.ModuleList([first, second])
            )
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*gradient broken*", "*test_theirs.py:9 in test_gradient*"])
    result.stdout.no_fnmatch_line("*assertion.py*")
