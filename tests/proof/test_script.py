"""Other people's scripts, unchanged, up to their first step: healthy ones are proved, and run as they would."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest
import torch
from script_cases import GAN, LOOP
from torch.optim.optimizer import _global_optimizer_pre_hooks

from qwen_fused.proof.script import prove_script

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
def test_healthy_script_is_proved(prove_text, body) -> None:
    run, _ = prove_text(body)
    assert not run.error, run.error
    assert run.report is not None and run.report.verdict == "proved", run.report
    assert run.report.rungs["correct"].ok is None and not run.report.rungs["correct"].asked
    assert [run.report.rungs[name].ok for name in ("declared", "connected", "nonzero", "applied")] == [True] * 4
    assert not [note for note in run.report.notes if "is cut" in note]


def test_names_and_figures(prove_text) -> None:
    report = prove_text(HEALTHY["bare tensors"])[0].report
    assert [row["layer"] for row in report.layers] == ["w", "b"]
    assert report.parameters == 2 and report.evaluations == 1 and report.loss > 0
    report = prove_text(HEALTHY["accumulated, clipped, autocast, scheduled, evaluated first"])[0].report
    assert report.evaluations == 4
    report = prove_text(HEALTHY["teacher, frozen layers in the optimizer"])[0].report
    assert report.notes == ["the optimizer holds 2 frozen parameters: encoder.weight, encoder.bias"]
    report = prove_text(HEALTHY["one side at zero"])[0].report
    assert "1 zero now but not one step on (a)" in report.rungs["nonzero"].detail


def test_both_optimizers_of_a_gan(prove_text) -> None:
    run, _ = prove_text(GAN)
    assert not run.error, run.error
    assert run.report.ok and run.report.parameters == 3, run.report
    assert "3 parameters moved" in run.report.rungs["applied"].detail


def test_gradients_cleared_after_the_step_are_no_loss(prove_text) -> None:
    run, _ = prove_text("""
        net = Net()
        optimizers = [torch.optim.SGD(net.encoder.parameters(), lr=0.1), torch.optim.AdamW(net.head.parameters())]
        for part in range(2):
            F.cross_entropy(net(x[part::2]), y[part::2]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    """)
    assert run.report.ok and run.report.evaluations == 2 and run.report.notes == [], run.report


def test_discriminator_that_asks_for_no_gradient_meanwhile(prove_text) -> None:
    frozen = "D.requires_grad_(False); (-D(fake).mean()).backward(); D.requires_grad_(True)"
    run, _ = prove_text(GAN.replace("(-D(fake).mean()).backward()", frozen))
    assert not run.error, run.error
    assert run.report.ok and run.report.parameters == 3, run.report


def test_optimizer_that_another_replaces(prove_text) -> None:
    run, _ = prove_text("net = Net(); old = torch.optim.SGD(net.parameters(), lr=0.1)" + LOOP)
    assert run.report.ok and run.report.parameters == 4, run.report


def test_optimizer_that_never_steps(prove_text) -> None:
    made = "net, other = Net(), Net(); unused = torch.optim.SGD(other.parameters(), lr=0.1)"
    run, _ = prove_text(made + LOOP.replace("9", "20"))
    assert run.report.ok and (run.report.parameters, run.report.evaluations) == (4, 9)
    assert "1 of 2 optimizers had not stepped: what they hold is not judged" in run.report.notes


def test_random_numbers_are_left_where_the_script_left_them(prove_text) -> None:
    run, _ = prove_text("net = Net(); net.spare = nn.Linear(2, 2); torch.manual_seed(7)" + LOOP)
    assert run.report.rungs["connected"].findings[0].kind == "unused"
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(7).get_state())


def test_arguments_folder_and_name_are_the_scripts_own(prove_text, tmp_path) -> None:
    (tmp_path / "beside.py").write_text("RATE = 0.5\n")
    argv, path = list(sys.argv), list(sys.path)
    run, _ = prove_text(
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


def test_exception_of_its_own_is_shown_as_its_own(prove_text) -> None:
    run, line = prove_text("""
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


def test_script_that_never_steps(prove_text) -> None:
    run, _ = prove_text("net = Net()\nF.cross_entropy(net(x), y).backward()")
    assert (run.report, run.error, run.left_with) == (None, "", None)
    run, _ = prove_text("raise SystemExit(3)")
    assert (run.report, run.error, run.left_with) == (None, "", 3)


def test_script_that_holds_on_to_everything(prove_text) -> None:
    run, _ = prove_text("""
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


def test_nothing_stays_patched(prove_text) -> None:
    before = torch.optim.Optimizer.add_param_group, torch.autograd.backward, torch.autograd.Function.__dict__["apply"]
    prove_text("net = Net()" + LOOP)
    assert before == (
        torch.optim.Optimizer.add_param_group, torch.autograd.backward, torch.autograd.Function.__dict__["apply"]
    )  # fmt: skip
    assert not _global_optimizer_pre_hooks
