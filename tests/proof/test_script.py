"""Other people's scripts, unchanged, up to their first step: healthy ones are proved, broken ones get the line."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

from qwen_fused.proof.script import prove_script

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
x, y = torch.randn(16, 6), torch.arange(16) % 3


class Net(nn.Module):
    def __init__(self, between=lambda h: h):
        super().__init__()
        self.encoder, self.head, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.head(self.between(torch.tanh(self.encoder(x))))
"""
ENCODER = ("encoder.weight", "encoder.bias")


@pytest.fixture
def prove(tmp_path):
    """Text of a script's own part -> how its run ended, and the number of the line with `# here`, if any."""

    def run(body, *arguments, allow=()):
        text = HEAD + textwrap.dedent(body)
        script = tmp_path / "train.py"
        script.write_text(text)
        ended = prove_script(script, arguments, allow)
        lines = [number for number, line in enumerate(text.splitlines(), 1) if "# here" in line]
        assert not torch.overrides._get_current_function_mode_stack()
        return ended, lines[0] if lines else None

    return run


HEALTHY = {
    "plain": """
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for step in range(10):
            assert step == 0, "only the first step is taken"
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        """,
    "accumulated, clipped, autocast, scheduled, evaluated first": """
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        with torch.no_grad():
            print("before", F.cross_entropy(net(x), y).item())
        for part in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x[part::4]), y[part::4]) / 4
            loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        """,
    "warm-up from a rate of 0": """
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        for step in range(5):
            assert step < 2
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            scheduler.step()
        """,
    "warm-up by hand": """
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for step in range(5):
            assert step < 2
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * step / 10
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        """,
    "float32 masters that move alone": """
        class Masters(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self):
                for p in self.param_groups[0]["params"]:
                    master = self.state[p].setdefault("master", p.float())
                    p.copy_(master.sub_(p.grad.float(), alpha=1e-6))
        net = Net().bfloat16()
        optimizer = Masters(net.parameters(), {"lr": 1e-6})
        F.cross_entropy(net(x.bfloat16()), y).backward()
        optimizer.step()
        """,
    "one side at zero": """
        class Adapter(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.zeros(2, 3))
        net = Adapter()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(5):
            assert step < 2
            optimizer.zero_grad()
            F.cross_entropy(x @ net.a @ net.b, y).backward()
            optimizer.step()
        """,
    "two optimizers of one loss": """
        net = Net()
        optimizers = [torch.optim.SGD(net.encoder.parameters(), lr=0.1), torch.optim.AdamW(net.head.parameters())]
        for step in range(5):
            assert step == 0
            F.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        """,
    "closure": """
        net = Net()
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss
        optimizer.step(closure)
        raise AssertionError("went on")
        """,
    "optimizers in the backward pass": """
        net = Net()
        each = {p: torch.optim.SGD([p], lr=0.1, foreach=False) for p in net.parameters()}
        def hook(p):
            each[p].step()
            each[p].zero_grad()
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(hook)
        F.cross_entropy(net(x), y).backward()
        raise AssertionError("went on")
        """,
    "compiled, checkpointed": """
        from torch.utils.checkpoint import checkpoint
        net = torch.compile(Net(lambda h: checkpoint(torch.relu, h * 2 + 1, use_reentrant=False)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        """,
    "made under a device, workers": """
        from torch.utils.data import DataLoader, TensorDataset
        with torch.device("cpu"):
            net = Net()
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        net.to(torch.float64)
        for xs, ys in DataLoader(TensorDataset(x, y), 4, num_workers=1):
            F.cross_entropy(net(xs.double()), ys).backward()
            optimizer.step()
        """,
    "teacher, frozen layers in the optimizer": """
        import copy
        net, teacher = Net(), Net()
        net.encoder.requires_grad_(False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        with torch.no_grad():
            wanted = teacher(x)
        F.mse_loss(net(x), wanted).backward()
        optimizer.step()
        """,
    "bare tensors": """
        w = torch.randn(6, 3, requires_grad=True)
        b = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([w, b], lr=0.1)
        def main():
            F.cross_entropy(x @ w + b, y).backward()
            optimizer.step()
        main()
        """,
    "accelerate": """
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = Net()
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
        for part in range(4):
            with accelerator.accumulate(net):
                accelerator.backward(F.cross_entropy(net(x[part::4]), y[part::4]))
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            assert part < 2
        """,
}


@pytest.mark.parametrize("body", HEALTHY.values(), ids=HEALTHY)
def test_healthy_script_is_proved(prove, body) -> None:
    run, _ = prove(body)
    assert not run.error, run.error
    assert run.report is not None and run.report.verdict == "proved", run.report
    assert run.report.rungs["correct"].ok is None and not run.report.rungs["correct"].asked
    assert [run.report.rungs[name].ok for name in ("declared", "connected", "nonzero", "applied")] == [True] * 4
    assert not [note for note in run.report.notes if "is cut" in note]


def test_names_and_figures(prove) -> None:
    report = prove(HEALTHY["bare tensors"])[0].report
    assert [row["layer"] for row in report.layers] == ["w", "b"]
    assert report.parameters == 2 and report.evaluations == 1 and report.loss > 0
    report = prove(HEALTHY["accumulated, clipped, autocast, scheduled, evaluated first"])[0].report
    assert report.evaluations == 4
    report = prove(HEALTHY["teacher, frozen layers in the optimizer"])[0].report
    assert report.notes == ["the optimizer holds 2 frozen parameters: encoder.weight, encoder.bias"]
    report = prove(HEALTHY["one side at zero"])[0].report
    assert "1 zero now but not one step on (a)" in report.rungs["nonzero"].detail


GAN = """
G, D = nn.Linear(4, 6), nn.Linear(6, 1, bias=False)
d_opt, g_opt = torch.optim.Adam(D.parameters()), torch.optim.Adam(G.parameters())
for step in range(3):
    assert step == 0
    fake = G(torch.randn(16, 4))
    d_opt.zero_grad()
    (D(fake.detach()).mean() - D(x).mean()).backward()
    d_opt.step()
    g_opt.zero_grad()
    (-D(fake).mean()).backward()
    g_opt.step()
    raise AssertionError("went on")
"""


def test_both_optimizers_of_a_gan(prove) -> None:
    run, _ = prove(GAN)
    assert not run.error, run.error
    assert run.report.ok and run.report.parameters == 3, run.report
    assert "3 parameters moved" in run.report.rungs["applied"].detail


def test_gradients_cleared_after_the_step_are_no_loss(prove) -> None:
    run, _ = prove("""
        net = Net()
        optimizers = [torch.optim.SGD(net.encoder.parameters(), lr=0.1), torch.optim.AdamW(net.head.parameters())]
        for part in range(2):
            F.cross_entropy(net(x[part::2]), y[part::2]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    """)
    assert run.report.ok and run.report.evaluations == 2 and run.report.notes == [], run.report


def test_generator_that_is_cut_off(prove) -> None:
    run, line = prove(GAN.replace("(-D(fake).mean()).backward()", "(-D(fake.detach()).mean()).backward()  # here"))
    found = run.report.rungs["connected"].findings
    assert [f.parameters for f in found] == [("G.weight", "G.bias")] and found[0].kind == "detach", run.report


def test_discriminator_that_asks_for_no_gradient_meanwhile(prove) -> None:
    frozen = "D.requires_grad_(False); (-D(fake).mean()).backward(); D.requires_grad_(True)"
    run, _ = prove(GAN.replace("(-D(fake).mean()).backward()", frozen))
    assert not run.error, run.error
    assert run.report.ok and run.report.parameters == 3, run.report


def test_optimizer_that_another_replaces(prove) -> None:
    run, _ = prove("net = Net(); old = torch.optim.SGD(net.parameters(), lr=0.1)" + LOOP)
    assert run.report.ok and run.report.parameters == 4, run.report


def test_optimizer_that_never_steps(prove) -> None:
    made = "net, other = Net(), Net(); unused = torch.optim.SGD(other.parameters(), lr=0.1)"
    run, _ = prove(made + LOOP.replace("9", "20"))
    assert run.report.ok and (run.report.parameters, run.report.evaluations) == (4, 9)
    assert "1 of 2 optimizers had not stepped: what they hold is not judged" in run.report.notes


LOOP = """
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(9):
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
"""
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
def test_cut_is_named_with_its_line(prove, kind, body) -> None:
    run, line = prove(textwrap.dedent(body) + LOOP)
    (finding,) = run.report.rungs["connected"].findings
    assert (finding.kind, finding.line, finding.parameters) == (kind, line, ENCODER), run.report
    assert finding.file.endswith("train.py") and run.report.verdict == "broken"
    assert run.report.rungs["applied"].ok


def test_loss_that_is_cut_off_from_everything(prove) -> None:
    run, line = prove("net = Net(); net.head.register_forward_hook(lambda m, i, out: out.detach())  # here" + LOOP)
    assert "element 0 of tensors does not require grad" in run.error
    (finding,) = run.report.rungs["connected"].findings
    assert (finding.kind, finding.line, len(finding.parameters)) == ("detach", line, 4), run.report
    assert run.report.rungs["applied"].detail == "no step was taken" and run.report.verdict == "broken"


def test_backward_pass_that_fails(prove) -> None:
    run, _ = prove("net = Net(lambda h: h.exp().mul_(h.tanh().add_(1)))" + LOOP)
    assert "modified by an inplace operation" in run.error
    (finding,) = run.report.rungs["connected"].findings
    assert finding.kind == "backward failed" and "modified by an inplace operation" in finding.detail


def test_layer_that_is_never_used(prove) -> None:
    run, _ = prove("net = Net(); net.spare = nn.Linear(2, 2)" + LOOP)
    (finding,) = run.report.rungs["connected"].findings
    assert (finding.kind, finding.parameters) == ("unused", ("spare.weight", "spare.bias")), run.report
    assert run.report.evaluations == 1


def test_each_parameter_is_given_its_own_reason(prove) -> None:
    run, line = prove("net = Net(lambda h: h.detach()); net.spare = nn.Linear(2, 2)  # here" + LOOP)
    found = {finding.kind: finding.parameters for finding in run.report.rungs["connected"].findings}
    assert found == {"detach": ENCODER, "unused": ("spare.weight", "spare.bias")}, run.report


def test_cut_is_allowed(prove) -> None:
    run, _ = prove(CUTS["detach"][1] + LOOP, allow=["encoder.*"])
    assert run.report.ok and run.report.allowed["encoder.*"] > 0


def test_zero_gradient_is_named_with_its_line(prove) -> None:
    run, line = prove("net = Net(lambda h: torch.round(h))  # here" + LOOP)
    (finding,) = run.report.rungs["nonzero"].findings
    assert (finding.kind, finding.line, finding.parameters) == ("zero", line, ENCODER), run.report


def test_bias_whose_gradient_cancels_is_a_note(prove) -> None:
    run, _ = prove("""
        net, bias = Net(), nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([*net.parameters(), bias], lr=1e-3)
        for step in range(9):
            optimizer.zero_grad()
            F.cross_entropy(net(x) + bias - bias, y).backward()
            optimizer.step()
    """)
    assert run.report.ok, run.report
    assert "the loss does not depend on bias: its gradient cancels to zero" in run.report.notes


def test_random_numbers_are_left_where_the_script_left_them(prove) -> None:
    run, _ = prove("net = Net(); net.spare = nn.Linear(2, 2); torch.manual_seed(7)" + LOOP)
    assert run.report.rungs["connected"].findings[0].kind == "unused"
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(7).get_state())


def test_nan_of_a_backward_pass_is_named_with_its_line(prove) -> None:
    run, line = prove("net = Net(lambda h: torch.sqrt(h * 0) + h)  # here" + LOOP)
    (finding,) = run.report.rungs["nonzero"].findings
    assert (finding.kind, finding.line) == ("non-finite", line), run.report
    assert set(finding.parameters) == set(ENCODER)


def test_layers_in_a_list_that_no_optimizer_holds(prove) -> None:
    run, _ = prove("net, extra = Net(), [nn.Linear(8, 8)]; net.between = lambda h: extra[0](h)" + LOOP)
    (finding,) = run.report.rungs["declared"].findings
    assert finding.kind == "not in the optimizer", run.report
    assert finding.parameters == ("Linear.weight", "Linear.bias")
    assert run.report.rungs["connected"].ok


def test_gradient_erased_before_the_step(prove) -> None:
    run, line = prove("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        optimizer.zero_grad()  # here
        optimizer.step()
    """)
    (finding,) = run.report.rungs["applied"].findings
    assert (finding.kind, finding.line, len(finding.parameters)) == ("erased", line, 4), run.report
    assert run.report.rungs["connected"].ok and "encoder.weight" in finding.parameters


def test_gradient_filled_with_zeros_before_the_step(prove) -> None:
    run, line = prove("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        net.head.weight.grad.zero_()  # here
        optimizer.step()
    """)
    (finding,) = run.report.rungs["applied"].findings
    assert (finding.kind, finding.line, finding.parameters) == ("erased", line, ("head.weight",)), run.report


def test_gradients_taken_away_between_two_passes(prove) -> None:
    run, line = prove("""
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
def test_step_that_moves_nothing(prove, made, kind) -> None:
    run, _ = prove(f"{made}\nfor step in range(9):\n    F.cross_entropy(net(x), y).backward()\n    optimizer.step()\n")
    (finding,) = run.report.rungs["applied"].findings
    assert finding.kind == kind and "encoder.weight" in finding.parameters


def test_part_in_evaluation_mode(prove) -> None:
    run, _ = prove("net = Net(); net.encoder.eval()" + LOOP)
    (finding,) = run.report.rungs["declared"].findings
    assert finding.kind == "eval mode" and finding.parameters == ENCODER


def test_partial_cut_is_a_note(prove) -> None:
    run, line = prove("net = Net(lambda h: h + h.sin().detach())  # here" + LOOP)
    assert run.report.ok
    assert any(f"train.py:{line} in" in note and "is cut" in note for note in run.report.notes)


def test_arguments_folder_and_name_are_the_scripts_own(prove, tmp_path) -> None:
    (tmp_path / "beside.py").write_text("RATE = 0.5\n")
    argv, path = list(sys.argv), list(sys.path)
    run, _ = prove(
        """
        import sys
        from beside import RATE
        assert sys.argv[0].endswith("train.py") and sys.argv[1:] == ["--rate", "3"], sys.argv
        assert __name__ == "__main__" and __file__ == sys.argv[0]
        net = Net()
        """
        + textwrap.indent(LOOP, " " * 8),
        "--rate",
        "3",
    )
    assert not run.error and run.report.ok
    assert (sys.argv, sys.path) == (argv, path) and "TORCHDYNAMO_DISABLE" not in os.environ


def test_exception_of_its_own_is_shown_as_its_own(prove) -> None:
    run, line = prove("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters())
        def main():
            net(x) @ torch.randn(7, 7)  # here
        main()
    """)
    assert run.report is None and "RuntimeError: mat1 and mat2" in run.error
    assert run.error.startswith("Traceback (most recent call last):\n")
    assert f'train.py", line {line}, in main' in run.error
    assert "qwen_fused" not in run.error and "runpy" not in run.error


def test_script_that_never_steps(prove) -> None:
    run, _ = prove("net = Net()\nF.cross_entropy(net(x), y).backward()")
    assert (run.report, run.error, run.left_with) == (None, "", None)
    run, _ = prove("raise SystemExit(3)")
    assert (run.report, run.error, run.left_with) == (None, "", 3)


def test_script_that_holds_on_to_everything(prove) -> None:
    run, _ = prove("""
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters())
        for step in range(100):
            try:
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
            except Exception:
                pass
            finally:
                print("tidied up")
    """)
    assert run.report.ok


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(ValueError, match="script must be a Python file, got .*nothing.py"):
        prove_script(tmp_path / "nothing.py")


def test_nothing_stays_patched(prove) -> None:
    before = torch.optim.Optimizer.add_param_group, torch.autograd.backward, torch.autograd.Function.apply.__func__
    prove("net = Net()" + LOOP)
    assert before == (
        torch.optim.Optimizer.add_param_group, torch.autograd.backward, torch.autograd.Function.apply.__func__
    )  # fmt: skip
    assert not _global_optimizer_pre_hooks
