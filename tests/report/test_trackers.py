"""Trackers get a run's numbers and pictures; one that fails costs a sentence and nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qwen_fused.report import trackers
from qwen_fused.report.trackers import TRACKERS, Trackers, tracker_names
from qwen_fused.train.loop import train

PICTURE = np.zeros((4, 6, 3), np.uint8)


def read_events(folder):
    """Scalars, {tag: [(step, value)]}, and picture tags of a folder's event files."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # 0 keeps every event
    read = events.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    return scalars, {tag: [e.step for e in read.Images(tag)] for tag in read.Tags()["images"]}


def test_a_run_in_tensorboard(small_config, capsys):
    pytest.importorskip("tensorboard")
    folder = train(small_config(max_batches=4, trackers="tensorboard", prompt_window=2))
    scalars, pictures = read_events(folder / "tensorboard")
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3, 4]
    # Qwen steps at the end of each window
    assert [step for step, _ in scalars["qwen_grad/layer 0"]] == [2, 4]
    assert {"qwen_grad", "mask_ratio", "reward", "qwen_grad/layer 0", "qwen_grad/other"} <= set(scalars)
    assert pictures["predictions"] == [0, 4]
    assert "failed" not in capsys.readouterr().out


def test_a_resumed_run_takes_the_place_of_what_it_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    for resume_step, steps, loss in [(None, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 2.0)]:
        sent = Trackers(["tensorboard"], tmp_path, {}, resume_step, pytest.fail)
        for step in steps:
            sent.scalars(step, {"loss": loss})
        sent.close()
    scalars, _ = read_events(tmp_path / "tensorboard")
    assert scalars["loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_real_package_offline(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    said = []
    sent = Trackers([name], tmp_path, {"seed": 1}, None, said.append)
    for step in (1, 2):
        sent.scalars(step, {"loss": 1.0 / step})
    sent.image(2, "predictions", PICTURE)
    sent.close()
    assert said == [] and [p for p in tmp_path.rglob("*") if p.is_file()]


class Module(ModuleType):
    """A package that keeps what it is told, in the form of trackio and wandb."""

    def __init__(self, name: str):
        super().__init__(name)
        self.told: list[tuple] = []
        self.Image = lambda pixels: ("image", pixels.shape)

    def init(self, **options):
        self.told.append(("init", options))
        return SimpleNamespace(
            log=lambda values, step: self.told.append((step, values)), finish=lambda: self.told.append(("finish",))
        )


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_a_package_is_told(name, tmp_path, monkeypatch):
    module = Module(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRACKIO_DIR", "x")
    sent = Trackers([name], tmp_path / "run-7", {"seed": 3}, None, pytest.fail)
    sent.scalars(5, {"loss": 2.5})
    sent.image(5, "predictions", PICTURE)
    sent.close()
    (_, options), *rest = module.told
    assert options["project"] == "qwen-fused" and options["name"] == "run-7" and options["config"] == {"seed": 3}
    assert rest == [(5, {"loss": 2.5}), (5, {"predictions": ("image", (4, 6, 3))}), ("finish",)]


class Failing:
    """Fails at the second batch, and again when closed."""

    def __init__(self, folder, config, resume_step):
        self.seen = 0

    def scalars(self, step, values):
        self.seen += 1
        if self.seen == 2:
            raise OSError("the disk is full\nand more")

    def image(self, step, name, pixels):
        raise SystemExit("goodbye")

    def close(self):
        raise RuntimeError("close")


def test_a_failing_tracker_is_said_once_and_left_out(small_config, unevaluated, monkeypatch, capsys):
    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    monkeypatch.setattr(trackers, "_is_installed", lambda name: True)
    monkeypatch.setattr(Failing, "image", lambda self, step, name, pixels: None)
    folder = train(small_config(max_batches=3, trackers="wandb"))
    out = capsys.readouterr().out
    assert out.count("Tracker wandb failed") == 1
    assert "Tracker wandb failed and is left out from here on: the disk is full\n" in out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("act", ["image", "close"])
def test_no_failure_passes(act, tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    said = []
    sent = Trackers(["wandb"], tmp_path, {}, None, said.append)
    if act == "image":
        sent.image(1, "predictions", PICTURE)
    sent.close()
    assert len(said) == 1 and not sent


def test_a_tracker_that_cannot_start(tmp_path, monkeypatch):
    def broken(*arguments):
        raise ConnectionError("no network")

    monkeypatch.setitem(TRACKERS, "wandb", broken)
    said = []
    Trackers(["wandb"], tmp_path, {}, None, said.append).scalars(1, {})
    assert said == ["Tracker wandb failed and is left out from here on: no network"]


def test_interrupt_passes(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(TRACKERS, "wandb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Trackers(["wandb"], tmp_path, {}, None, pytest.fail)


def test_names(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name != "wandb")
    assert tracker_names("none") == () and tracker_names("auto") == ("tensorboard",)
    assert tracker_names("trackio, tensorboard,trackio") == ("trackio", "tensorboard")
    with pytest.raises(ValueError, match="got 'tensorbord'; did you mean tensorboard.$"):
        tracker_names("tensorbord")
    with pytest.raises(ValueError, match="^trackers: wandb is not installed here"):
        tracker_names("trackio,wandb")
    monkeypatch.setattr(trackers, "_is_installed", lambda name: False)
    assert tracker_names("auto") == ()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "notapackage").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("notapackage") is not None and not trackers._is_installed("notapackage")


def test_nothing_is_imported_that_is_not_asked_for():
    code = (
        "import sys, qwen_fused.report.run_log; "
        "print([n for n in ('tensorboard', 'trackio', 'wandb') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
