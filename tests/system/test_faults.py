"""What happens to machines: each fault ends a run in one sentence and a known exit code, and the run can go on."""

from __future__ import annotations

import errno
import functools
import json
import operator
import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_runs import flags, fork, rows
from soak import only_run, unequal

from qwen_fused.cli import main as cli
from qwen_fused.common.files import atomic_replace, lock_folder
from qwen_fused.config import TrainConfig
from qwen_fused.planner.agent import GridAgent
from qwen_fused.train import checkpoint, loop
from qwen_fused.train.checkpoint import list_checkpoints, read_state
from qwen_fused.train.signals import Interrupted, catch_signals
from qwen_fused.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("unevaluated")


@pytest.fixture
def command(small_config) -> list[str]:
    """`qwen-fused train` of eight batches with a checkpoint after every second one."""
    settings = small_config(max_batches=8, checkpoint_every=2, on_nonfinite="stop")
    names = ("dataset", "qwen", "val_fraction", "batch_size", "agent_channels", "prompt_dim", "policy_hidden", "device")
    names += ("plan_steps", "out", "epochs", "checkpoint_every", "eval_every", "prove", "prompt_window", "max_batches")
    return ["train", *flags(**{name: getattr(settings, name) for name in names})]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "runs"


def sentence(capsys) -> str:
    """What stderr says: one sentence, no traceback."""
    error = capsys.readouterr().err
    assert error.startswith("qwen-fused: ") and len(error.strip().splitlines()) == 1, error
    return error


def before_batch(monkeypatch, number: int, act) -> None:
    """Do something as a batch begins."""
    train_step = Trainer.train_step

    def acting(self, *args, **kwargs):
        if self.progress.step == number - 1:
            act(self)
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", acting)


def go_on(out: Path, *more: str) -> list[int]:
    """Continue the run in `out`; the steps of its rows."""
    run = only_run(out)
    assert cli.main(["train", "--resume", str(run), *more]) == 0
    assert not list(run.rglob(".partial-*"))
    return [row["step"] for row in rows(run)]


ALL = list(range(1, 9))


def test_file_size_limit_stops_the_run_and_leaves_the_last_checkpoint(command, out, tmp_path):
    def limited() -> int:
        def limit(trainer):
            size = list_checkpoints(trainer.folder / "checkpoints")[-1].stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

        with pytest.MonkeyPatch.context() as patch:
            before_batch(patch, 5, limit)
            return cli.main(command)

    output = tmp_path / "output.txt"
    assert os.waitstatus_to_exitcode(os.waitpid(fork(limited, output), 0)[1]) == 1
    said = output.read_text().splitlines()[-1]
    assert said.startswith("qwen-fused: batch 6: ") and "File too large" in said
    assert "step-000004.safetensors is the last checkpoint" in said and "--resume" in said
    assert go_on(out) == ALL


@pytest.mark.parametrize("file", ["_metrics._file", "_log"])
def test_full_disk_under_a_log_file(command, out, capsys, monkeypatch, file):
    init = loop.RunLog.__init__

    def full(self, *args, **kwargs):
        init(self, *args, **kwargs)
        *owner, name = file.split(".")
        full_file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
        setattr(operator.attrgetter(*owner)(self) if owner else self, name, full_file)

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLog, "__init__", full)
        assert cli.main(command) == 1
    assert "No space left on device; there is no checkpoint yet" in sentence(capsys)
    assert go_on(out) == ALL


def test_full_disk_under_a_checkpoint(command, out, capsys, monkeypatch):
    def full(tensors, path, metadata):
        if "step-000004" in path.name:
            # as the library says it
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert cli.main(command) == 1
    said = sentence(capsys)
    assert re.search(r"batch 4: .*step-000004.safetensors: .*No space left on device.*; step-000002", said)
    assert [path.name for path in (only_run(out) / "checkpoints").iterdir()] == ["step-000002.safetensors"]
    assert go_on(out) == ALL


def test_file_that_fails_half_way_is_not_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_replace(tmp_path / "a") as partial:
        partial.write_text("ne")
        raise OSError(errno.ENOSPC, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@contextmanager
def unprivileged(*folders: Path) -> Iterator[Path]:
    """A folder, with copies of others, for a while as a user whom permissions bind."""
    root = Path(tempfile.mkdtemp())
    for folder in folders:
        shutil.copytree(folder, root / folder.name)
    root.chmod(0o755)
    before = os.geteuid()
    if before == 0:
        for path in [root, *root.rglob("*")]:
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
    try:
        yield root
    finally:
        if before == 0:
            os.seteuid(0)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(root)


def test_read_only_run_folder_is_refused_before_anything_is_loaded(command, out, small_arc, capsys, monkeypatch):
    assert cli.main(command) == 0
    capsys.readouterr()
    monkeypatch.setattr(Trainer, "__init__", lambda *args: pytest.fail("loaded first"))
    with unprivileged(only_run(out)) as root:
        run = next(root.iterdir())
        run.chmod(0o555)
        assert cli.main(["train", "--resume", str(run)]) == 2
        assert f"must be one that can be written to, got {run}" in sentence(capsys)
        assert cli.main([*command, "--out", str(run)]) == 2
        assert f"out must be a folder that can be written to, got {run}" in sentence(capsys)
        assert cli.main(["report", str(run)]) == 2
        assert str(run) in sentence(capsys)


def test_folder_that_becomes_read_only_stops_the_run(command, small_arc, small_qwen, capsys, monkeypatch):
    before_batch(monkeypatch, 3, lambda trainer: (trainer.folder / "checkpoints").chmod(0o555))
    with unprivileged(small_arc, small_qwen) as root:
        here = flags(out=root / "runs", dataset=root / small_arc.name, qwen=root / small_qwen.name)
        assert cli.main([*command, *here]) == 1
        said = sentence(capsys)
    assert "Permission denied" in said or "os error 13" in said
    assert "step-000002.safetensors is the last checkpoint" in said


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_leaves_a_checkpoint_and_its_own_code(command, out, monkeypatch, number, code):
    with monkeypatch.context() as patch:
        before_batch(patch, 5, lambda trainer: os.kill(os.getpid(), number))
        assert cli.main(command) == code
    assert list_checkpoints(only_run(out) / "checkpoints")[-1].name == "step-000005.safetensors"
    assert "Interrupted after batch 5; to go on: qwen-fused train --resume" in (only_run(out) / "train.log").read_text()
    assert go_on(out) == ALL


def test_second_signal_acts_at_once():
    before = signal.getsignal(signal.SIGTERM)
    # for a caller, as Ctrl-C without a run
    with pytest.raises(KeyboardInterrupt) as stopped, catch_signals() as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(stopped.value, Interrupted) and stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_out_of_memory_as_the_model_is_built(command, out, capsys, monkeypatch):
    # an agent of 2 million channels, which no flag may ask for
    agent = functools.partial(GridAgent, channels=2_000_000, prompt_dim=8, steps=2)
    monkeypatch.setattr("qwen_fused.planner.model.make_agent", lambda config: agent())
    assert cli.main(command) == 1
    assert "--batch-size" in sentence(capsys)
    assert not list(out.iterdir()), "a run that never was leaves no folder"


def test_out_of_memory_in_a_batch_keeps_what_was_saved(command, out, capsys, monkeypatch):
    def full(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        before_batch(patch, 6, full)
        assert cli.main(command) == 1
    assert "2.00 GiB" in (said := sentence(capsys)) and "--gradient-checkpointing" in said
    assert "out of memory" in (only_run(out) / "train.log").read_text()
    assert go_on(out) == ALL


@pytest.mark.parametrize("window", [1, 3])
def test_nan_at_a_batch_stops_and_goes_on_behind_it(small_config, monkeypatch, window):
    def plant(trainer):
        if not trainer.hooked:
            trainer.hooked = True
            spoil = trainer.groups["agent"][0][1].register_hook(lambda grad: (spoil.remove(), grad * float("nan"))[1])

    monkeypatch.setattr(Trainer, "hooked", False, raising=False)
    before_batch(monkeypatch, 4, plant)
    config = small_config(max_batches=8, prompt_window=window)
    with pytest.raises(loop.TrainingStopped, match="batch 4: .*group agent, first in .*--on-nonfinite"):
        loop.train(config)
    run = only_run(config.out)
    loop.train(replace(config, resume=run))
    # bit for bit what skipping that batch gives
    skipped = loop.train(replace(config, on_nonfinite="skip", out=config.out / "skipped"))
    assert [row["nonfinite"] for row in rows(run)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert rows(run) == rows(skipped)
    assert unequal(*(read_state(list_checkpoints(f / "checkpoints")[-1]) for f in (run, skipped))) is None


def test_row_of_a_nan_is_json(small_config, monkeypatch):
    def spoil(trainer):
        next(trainer.model.agent.parameters()).data.fill_(float("nan"))

    before_batch(monkeypatch, 3, spoil)
    config = small_config(max_batches=8)
    with pytest.raises(loop.TrainingStopped, match="batch 3: .*the loss was nan"):
        loop.train(config)
    lines = (only_run(config.out) / "metrics.jsonl").read_text().splitlines()
    third = json.loads(lines[2], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert third["loss"] is None and third["nonfinite"] == 1


def test_data_deleted_in_the_middle_matters_at_the_next_start(small_config, small_arc, tmp_path, monkeypatch):
    tasks = Path(shutil.copytree(small_arc, tmp_path / "tasks"))
    config = small_config(max_batches=8, checkpoint_every=2, dataset=str(tasks))
    before_batch(monkeypatch, 4, lambda trainer: shutil.rmtree(tasks))
    run = loop.train(config)
    assert [row["step"] for row in rows(run)] == ALL
    with pytest.raises(ValueError, match="dataset must be .* does not exist"):
        loop.train(replace(config, resume=run, max_batches=9))
    assert [row["step"] for row in rows(run)] == ALL


def test_run_folder_has_one_writer(small_config, tmp_path):
    run = loop.train(small_config(max_batches=1))
    config = replace(TrainConfig.load(run / "config.yaml"), resume=run, max_batches=2)
    with lock_folder(run), pytest.raises(ValueError, match="another process writes to"):
        loop.train(config)
    loop.train(config)
