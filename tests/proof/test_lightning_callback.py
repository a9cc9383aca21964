"""qwen_fused.lightning.Prove in Lightning's own Trainer: a healthy run is as without it, a broken one takes no step."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from proof_cases import marked
from small_loops import weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qwen_fused as qf

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is an extra of development")


LOGGED: list[str] = []


class Module(lightning.LightningModule):
    """A normalised, dropped-out network, which logs and counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 3)
        self.turns, self.losses = 0, {"train": []}

    def hidden(self, x):
        return self.encoder(x)

    def log(self, name, *args, **kwargs):
        LOGGED.append(name)
        super().log(name, *args, **kwargs)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.head(self.hidden(x)), y)
        self.turns += 1
        self.losses["train"].append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Scheduled(Module):
    """Takes no batch number, and has hooks of its own around the backward pass and the step."""

    def training_step(self, batch):
        return super().training_step(batch, 0)["loss"]

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad.mul_(1.0)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Manual(Module):
    """Two optimizers, stepped one after the other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        loss = F.cross_entropy(self.head(self.hidden(x).detach()), y)
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        loss = F.cross_entropy(self.head(self.hidden(x)), y)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.losses["train"].append(loss.item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters()), torch.optim.AdamW(self.encoder.parameters())


def fit(module, *callbacks, **changes):
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, torch.arange(48) % 3), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=list(callbacks), **changes,
    )  # fmt: skip
    torch.manual_seed(3)
    trainer.fit(module, data)
    return trainer


def half():
    """fp16 with a gradient scaler, which Lightning leaves to GPUs unless it is asked for by name."""
    return lightning.plugins.precision.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


MODES = {
    "plain": (Module, {}),
    "accumulated, clipped": (Module, dict(accumulate_grad_batches=2, gradient_clip_val=0.1)),
    "bf16": (Module, dict(precision="bf16-mixed")),
    "float64": (Module, dict(precision="64-true")),
    "fp16": (Module, dict(gradient_clip_val=0.5)),
    "hooks": (Scheduled, {}),
    "manual": (Manual, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_healthy_run_is_proved_and_goes_on_as_without(mode) -> None:
    cls, changes = MODES[mode]
    changes = {**changes, **({"plugins": [half()]} if mode == "fp16" else {})}
    plain, proved, callback = cls(), cls(), qf.lightning.Prove()
    LOGGED.clear()
    without = fit(plain, **changes)
    logged = len(LOGGED)
    changes |= {"plugins": [half()]} if mode == "fp16" else {}
    trainer = fit(proved, callback, **changes)
    assert callback.report.verdict == "proved", callback.report
    assert callback.report.parameters == (2 if cls is Manual else 5)
    assert torch.equal(weights(plain), weights(proved))
    assert (proved.turns, proved.losses) == (plain.turns, plain.losses)
    assert trainer.global_step == without.global_step > 0
    assert trainer.callback_metrics == without.callback_metrics
    assert len(LOGGED) == 2 * logged and "log" not in vars(proved)
    if mode == "fp16":
        scalers = [one.precision_plugin.scaler.state_dict() for one in (without, trainer)]
        assert scalers[0] == scalers[1] and scalers[0]["scale"] == 64.0


class Detached(Module):
    def hidden(self, x):
        return self.encoder(x).detach()  # here


class ManualDetached(Manual):
    def training_step(self, batch, batch_idx):
        x, y = batch
        second = self.optimizers()[1]
        hidden = self.hidden(x)
        loss = F.cross_entropy(self.head(hidden.data), y)  # here
        second.zero_grad()
        self.manual_backward(loss)
        second.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls, broken", [(Detached, Detached.hidden), (ManualDetached, ManualDetached.training_step)])
def test_broken_run_stops_before_its_first_step_at_the_line(cls, broken) -> None:
    module = cls()
    before = weights(module)
    with pytest.raises(qf.GradientError) as stopped:
        fit(module, qf.lightning.Prove())
    assert torch.equal(weights(module), before)
    cut = stopped.value.report.cut
    assert (cut.file, cut.line) == (__file__, marked(broken))
    assert "encoder.0.weight" in cut.parameters
    assert f"test_lightning_callback.py:{cut.line} in" in str(stopped.value)


class Erasing(Module):
    def on_after_backward(self):
        self.head.weight.grad = None


@pytest.mark.filterwarnings("ignore")
def test_gradient_erased_by_a_hook() -> None:
    with pytest.raises(qf.GradientError) as stopped:
        fit(Erasing(), qf.lightning.Prove())
    (finding,) = stopped.value.report.rungs["applied"].findings
    assert (finding.kind, finding.parameters) == ("erased", ("head.weight",))
    assert finding.frame.source == "self.head.weight.grad = None"


@pytest.mark.filterwarnings("ignore")
def test_only_warns(caplog) -> None:
    callback = qf.lightning.Prove(only_warn=True)
    trainer = fit(Detached(), callback)
    assert trainer.global_step == 6 and callback.report.verdict == "broken"
    messages = [r.message for r in caplog.records if r.name == "qwen_fused" and r.levelno == logging.WARNING]
    assert len(messages) == 1 and f"test_lightning_callback.py:{marked(Detached.hidden)}" in messages[0]


@pytest.mark.filterwarnings("ignore")
def test_intended_cut_is_allowed() -> None:
    callback = qf.lightning.Prove(allow="encoder.*")
    fit(Detached(), callback)
    assert callback.report.ok, callback.report


class Skipping(Module):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.filterwarnings("ignore")
def test_first_step_without_a_loss() -> None:
    with pytest.raises(ValueError, match="training_step must return a loss"):
        fit(Skipping(), qf.lightning.Prove())
