"""Loops as other people write them: the healthy are proved, of the broken rung, kind and line are named."""

from __future__ import annotations

import copy
import importlib
import inspect
import linecache
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import CASES, X, Y, adamw
from proof_sweep import loops
from torch.utils.checkpoint import checkpoint

from qwen_fused.proof.prove import prove

LIBRARIES = ("accelerate", "peft", "torch", "transformers")
for more in (
    "field_optimizers",
    "field_faults",
    "field_libraries",
    "field_derivatives",
    "field_stop_gradients",
    "field_changed_gradients",
    "field_types",
    "field_outside",
):
    # each adds its own to the list
    importlib.import_module(more)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case):
    pytest.importorskip(case.library)
    torch.manual_seed(0)
    arguments = case.build()
    if case.answer == "refused":
        with pytest.raises(ValueError, match=case.says):
            prove(**arguments)
        return
    report = prove(**arguments)
    if case.answer == "proved":
        assert report.verdict == "proved", report
        # only what was planned is worth a note
        assert case.says in "\n".join(report.notes), report
        if case.library == "torch" and case.says != "computed by other threads":
            # nothing stands in the way of float64, nor of telling as much as float32 allows
            in_half = ("clip_after_unscaling", "bias_before_a_normalisation_in_16_bits")
            resolved = "3e-02" if case.name in in_half else "2e-03"
            detail = report.rungs["correct"].detail
            assert "in float64 to" in detail and f"(resolved {resolved})" in detail, report
            assert "first order says" in report.rungs["applied"].detail, report
        return
    assert report.verdict != "proved", report
    assert case.says in [finding.kind for finding in report.rungs[case.answer].findings], report
    if "# here" in inspect.getsource(case.build):
        frame = report.rungs[case.answer].findings[0].frame
        assert frame is not None and "# here" in linecache.getline(frame.file, frame.line), report


def test_every_kind_of_answer_is_asked_for():
    assert {case.answer for case in CASES} >= {"proved", "refused", "declared", "connected", "correct", "applied"}


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        (10_000_000, "in float64"),
        (1400, "layer by layer, 2 of them, to stay within"),
        (100, "in the model's own precision"),
    ],
)
def test_memory_is_kept_to_and_said(memory, says):
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    report = prove(lambda: F.cross_entropy(net(X), Y), net, adamw(net), memory=memory)
    assert report.ok and says in report.rungs["correct"].detail, report


def test_fault_is_found_layer_by_layer():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def backward(loss):
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            p.grad = 2 * g if p is net[0].weight else g

    report = prove(lambda: F.cross_entropy(net(X), Y), net, adamw(net), backward=backward, memory=1400)
    assert report.rungs["correct"].ok is False and report.rungs["correct"].parameters == ("0.weight",), report


def test_table_of_the_page_counts_these_cases():
    page = Path(__file__).resolve().parents[2] / "docs" / "proof.md"
    rows = [
        row.split("|")[1:6]
        for row in page.read_text().splitlines()
        if row.startswith(tuple("| " + name for name in LIBRARIES))
    ]
    told = {row[0].strip(): int(row[2]) for row in rows}
    counted = Counter(case.library for case in CASES) + Counter(library for _, library, _ in loops())
    assert told == dict(counted), "run `make docs`"


def test_nothing_wide_is_left_in_the_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.last = nn.Linear(8, 3), None
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            h = self.f(x)
            self.count.data = 0.9 * self.count.data + h.detach().mean(0)
            self.last = h.detach()
            return h + self.count

    net = Net()
    net.count.requires_grad_(False)
    net(X)
    before = copy.deepcopy(net.state_dict()), net.last.clone(), net.count.data_ptr()
    assert prove(lambda: F.cross_entropy(net(X), Y), net, adamw(net)).ok
    assert net.count.dtype == net.last.dtype == net(X).dtype == torch.float32
    assert torch.equal(before[1], net.last) or net.last is not None
    assert before[2] != 0 and list(before[0]) == list(net.state_dict())


def test_state_comes_back_after_an_exception():
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.calls, self.register = 0, None
            self.register_buffer("seen", torch.zeros(2))

        def forward(self, x):
            self.calls += 1
            self.seen.data = self.seen.data.double() + 1
            made.append(1)
            if len(made) == 3:
                raise RuntimeError("on purpose")
            return super().forward(x)

    made: list[int] = []
    net = Net()
    with pytest.raises(RuntimeError, match="on purpose"):
        prove(lambda: F.cross_entropy(net(X), Y), net, adamw(net))
    assert net.calls == 0 and net.seen.dtype == torch.float32 and not net.seen.any()
    assert all(p.grad is None for p in net.parameters())


def test_reason_is_told_where_float64_can_not_be_had():
    class Single(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            if h.dtype != torch.float32:
                raise RuntimeError("this kernel has no float64")
            return h

    net = Single(8, 3)
    # the function mode makes every type look wide, which is what such code trips over
    report = prove(lambda: F.cross_entropy(net(X), Y), net, adamw(net))
    assert report.ok and "this kernel has no float64" in report.rungs["correct"].detail


def test_generator_that_is_named_stands_where_it_stood():
    generator = torch.Generator().manual_seed(5)
    net = nn.Linear(8, 3)
    state = generator.get_state()
    loss = lambda: F.cross_entropy(net(X + 0.1 * torch.randn(16, 8, generator=generator)), Y)  # noqa: E731
    assert prove(loss, net, adamw(net)).ok
    assert torch.equal(generator.get_state(), state)


def test_complex_type_that_is_asked_for_by_name_is_widened():
    net = nn.Linear(8, 3)
    report = prove(lambda: (1j * net(X).to(torch.complex64)).exp().real.pow(2).mean(), net, adamw(net))
    deviation = report.rungs["correct"].detail.partition("in float64 to ")[2].split()[0]
    assert report.ok and float(deviation) < 1e-5, report


def test_zeros_that_a_checkpoint_hides_are_no_cancellation():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(2, 8))

        def forward(self, x):
            return x + x @ self.down @ self.up

    net = nn.Sequential(nn.Linear(8, 8), Adapter(), nn.Linear(8, 3))
    loss = lambda: F.cross_entropy(net[2](checkpoint(net[1], net[0](X), use_reentrant=False)), Y)  # noqa: E731
    report = prove(loss, net, adamw(net))
    assert report.rungs["nonzero"].ok is False and set(report.rungs["nonzero"].parameters) == {"1.down", "1.up"}, report
