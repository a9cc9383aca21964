"""Broken scripts under prove-script: rung, parameters and line are named."""

from __future__ import annotations

import textwrap

import pytest
from script_cases import ENCODER, GAN, LOOP

CUTS = {
    "detach": ("detach", "net = Net(lambda h: h.detach())  # here"),
    "new tensor": ("new tensor", "net = Net(lambda h: torch.tensor(h))  # here"),
    "numpy": ("numpy", "net = Net(lambda h: torch.from_numpy(h.detach().numpy()))  # here"),
    "argmax": ("argmax", "net = Net(lambda h: F.one_hot(h.argmax(-1), 8).float())  # here"),
    "no_grad": (
        "no_grad",
        """
        def between(h):
            with torch.no_grad():  # here
                return h * 2
        net = Net(between)
        """,
    ),
    "custom function": (
        "custom function",
        """
        class Stop(torch.autograd.Function):
            @staticmethod
            def forward(ctx, h):
                return h * 1

            @staticmethod
            def backward(ctx, grad):
                return None
        net = Net(lambda h: Stop.apply(h))  # here
        """,
    ),
}


@pytest.mark.filterwarnings("ignore:.*clone.*detach.*")
@pytest.mark.parametrize("kind, body", CUTS.values(), ids=CUTS)
def test_cut_is_named_with_its_line(prove_text, kind, body) -> None:
    run, line = prove_text(textwrap.dedent(body) + LOOP)
    (finding,) = run.report.rungs["connected"].findings
    assert (finding.kind, finding.line, finding.parameters) == (kind, line, ENCODER), run.report
    assert finding.file.endswith("train.py") and run.report.verdict == "broken"
    assert run.report.rungs["applied"].ok


def test_loss_that_is_cut_off_from_everything(prove_text) -> None:
    run, line = prove_text("net = Net(); net.head.register_forward_hook(lambda m, i, out: out.detach())  # here" + LOOP)
    assert "element 0 of tensors does not require grad" in run.error
    (finding,) = run.report.rungs["connected"].findings
    assert (finding.kind, finding.line, len(finding.parameters)) == ("detach", line, 4), run.report
    assert run.report.rungs["applied"].detail == "no step was taken" and run.report.verdict == "broken"


def test_backward_pass_that_fails(prove_text) -> None:
    run, _ = prove_text("net = Net(lambda h: h.exp().mul_(h.tanh().add_(1)))" + LOOP)
    assert "modified by an inplace operation" in run.error
    (finding,) = run.report.rungs["connected"].findings
    assert finding.kind == "backward failed" and "modified by an inplace operation" in finding.detail


def test_layer_that_is_never_used(prove_text) -> None:
    run, _ = prove_text("net = Net(); net.spare = nn.Linear(2, 2)" + LOOP)
    (finding,) = run.report.rungs["connected"].findings
    assert (finding.kind, finding.parameters) == ("unused", ("spare.weight", "spare.bias")), run.report
    assert run.report.evaluations == 1


def test_each_parameter_is_given_its_own_reason(prove_text) -> None:
    run, line = prove_text("net = Net(lambda h: h.detach()); net.spare = nn.Linear(2, 2)  # here" + LOOP)
    found = {finding.kind: finding.parameters for finding in run.report.rungs["connected"].findings}
    assert found == {"detach": ENCODER, "unused": ("spare.weight", "spare.bias")}, run.report


def test_cut_is_allowed(prove_text) -> None:
    run, _ = prove_text(CUTS["detach"][1] + LOOP, allow=["encoder.*"])
    assert run.report.ok and run.report.allowed["encoder.*"] > 0


def test_zero_gradient_is_named_with_its_line(prove_text) -> None:
    run, line = prove_text("net = Net(lambda h: torch.round(h))  # here" + LOOP)
    (finding,) = run.report.rungs["nonzero"].findings
    assert (finding.kind, finding.line, finding.parameters) == ("zero", line, ENCODER), run.report


@pytest.mark.parametrize("reentrant", [False, True])
def test_zeros_that_a_checkpoint_hides_are_no_cancellation(prove_text, reentrant) -> None:
    run, line = prove_text(f"""
        from torch.utils.checkpoint import checkpoint
        down, up = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(2, 8))
        adapt = lambda h: h + h @ down @ up  # here
        net = Net(lambda h: checkpoint(adapt, h, use_reentrant={reentrant}))
        optimizer = torch.optim.AdamW([*net.parameters(), down, up], lr=1e-3)
        for step in range(9):
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    """)
    found = run.report.rungs["nonzero"].findings
    assert {name for finding in found for name in finding.parameters} == {"down", "up"}, run.report
    assert reentrant or {finding.line for finding in found} == {line}


def test_bias_whose_gradient_cancels_is_a_note(prove_text) -> None:
    run, _ = prove_text("""
        net, bias = Net(), nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([*net.parameters(), bias], lr=1e-3)
        for step in range(9):
            optimizer.zero_grad()
            F.cross_entropy(net(x) + bias - bias, y).backward()
            optimizer.step()
    """)
    assert run.report.ok, run.report
    assert "the loss does not depend on bias: its gradient cancels to zero" in run.report.notes


def test_generator_that_is_cut_off(prove_text) -> None:
    run, line = prove_text(GAN.replace("(-D(fake).mean()).backward()", "(-D(fake.detach()).mean()).backward()  # here"))
    found = run.report.rungs["connected"].findings
    assert [f.parameters for f in found] == [("G.weight", "G.bias")] and found[0].kind == "detach", run.report


def test_nan_of_a_backward_pass_is_named_with_its_line(prove_text) -> None:
    run, line = prove_text("net = Net(lambda h: torch.sqrt(h * 0) + h)  # here" + LOOP)
    (finding,) = run.report.rungs["nonzero"].findings
    assert (finding.kind, finding.line) == ("non-finite", line), run.report
    assert set(finding.parameters) == set(ENCODER)


def test_layers_in_a_list_that_no_optimizer_holds(prove_text) -> None:
    run, _ = prove_text("net, extra = Net(), [nn.Linear(8, 8)]; net.between = lambda h: extra[0](h)" + LOOP)
    (finding,) = run.report.rungs["declared"].findings
    assert finding.kind == "not in the optimizer", run.report
    assert finding.parameters == ("Linear.weight", "Linear.bias")
    assert run.report.rungs["connected"].ok


def test_gradient_erased_before_the_step(prove_text) -> None:
    run, line = prove_text("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        optimizer.zero_grad()  # here
        optimizer.step()
    """)
    (finding,) = run.report.rungs["applied"].findings
    assert (finding.kind, finding.line, len(finding.parameters)) == ("erased", line, 4), run.report
    assert run.report.rungs["connected"].ok and "encoder.weight" in finding.parameters


def test_gradient_filled_with_zeros_before_the_step(prove_text) -> None:
    run, line = prove_text("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        net.head.weight.grad.zero_()  # here
        optimizer.step()
    """)
    (finding,) = run.report.rungs["applied"].findings
    assert (finding.kind, finding.line, finding.parameters) == ("erased", line, ("head.weight",)), run.report


def test_gradients_taken_away_between_two_passes(prove_text) -> None:
    run, line = prove_text("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for part in range(2):
            optimizer.zero_grad()  # here
            F.cross_entropy(net(x[part::2]), y[part::2]).backward()
        optimizer.step()
    """)
    (note,) = run.report.notes
    assert f"train.py:{line} in" in note and "between the step's 2 backward passes" in note


@pytest.mark.parametrize(
    "made, kind",
    [
        ("net = Net(); optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)", "learning rate 0"),
        ("net = Net().bfloat16(); optimizer = torch.optim.SGD(net.parameters(), lr=1e-9); x = x.bfloat16()",
         "rounded away"),
    ],
)  # fmt: skip
def test_step_that_moves_nothing(prove_text, made, kind) -> None:
    run, _ = prove_text(
        f"{made}\nfor step in range(9):\n    F.cross_entropy(net(x), y).backward()\n    optimizer.step()\n"
    )
    (finding,) = run.report.rungs["applied"].findings
    assert finding.kind == kind and "encoder.weight" in finding.parameters


def test_part_in_evaluation_mode(prove_text) -> None:
    run, _ = prove_text("net = Net(); net.encoder.eval()" + LOOP)
    (finding,) = run.report.rungs["declared"].findings
    assert finding.kind == "eval mode" and finding.parameters == ENCODER


def test_partial_cut_is_a_note(prove_text) -> None:
    run, line = prove_text("net = Net(lambda h: h + h.sin().detach())  # here" + LOOP)
    assert run.report.ok
    assert any(f"train.py:{line} in" in note and "is cut" in note for note in run.report.notes)
