"""The command line: the line people type works as it stands, and what is wrong gets one sentence and code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_fused.cli import main
from qwen_fused.config import TrainConfig


@pytest.fixture
def small(small_arc, tmp_path) -> list[str]:
    """Flags of a run of milliseconds."""
    return (
        f"--dataset {small_arc} --val-fraction 0.25 --batch_size 4 --agent-channels 16 --prompt-dim 32 "
        f"--policy-hidden 32 --plan-steps 2 --device cpu --max-batches 3 --out {tmp_path / 'runs'}"
    ).split()


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_the_line_people_type_parses(small, tmp_path):
    line = "train --epochs 10 --agent_lr 1e-5 --qwen_lr 5e-5 --device cpu"
    assert main([*line.split(), *small]) == 0
    config = TrainConfig.load(only_run(tmp_path) / "config.yaml")
    assert (config.epochs, config.agent_lr, config.qwen_lr) == (10, 1e-5, 5e-5)


def test_train_eval_report_resume(small, tmp_path, capsys):
    assert main(["train", *small, "--weights.risk", "0.25"]) == 0
    run = only_run(tmp_path)
    assert TrainConfig.load(run / "config.yaml").weights.risk == 0.25
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()
    assert main(["eval", str(run), "--split", "training", "--weights", "best"]) == 0
    submission = json.loads((run / "submission-training.json").read_text())
    assert all({"attempt_1", "attempt_2"} == set(a) for attempts in submission.values() for a in attempts)
    # the run's own configuration is the default of every flag
    assert main(["train", "--resume", str(run), "--max-batches", "5"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    assert "Continuing from" in capsys.readouterr().out


def test_prove_exits_0_and_writes_json(small, tmp_path, capsys):
    assert main(["prove", *small, "--json", str(tmp_path / "proof.json")]) == 0
    assert "connected" in capsys.readouterr().out
    assert json.loads((tmp_path / "proof.json").read_text())["ok"]
    assert not (tmp_path / "runs").exists()


def test_prove_exits_1_when_the_loop_cannot_learn(small, monkeypatch, capsys):
    from qwen_fused.model import QwenPlanner

    forward = QwenPlanner.forward

    def silent(self, batch, *, epoch):
        out = forward(self, batch, epoch=epoch)
        out.loss = out.loss.detach()
        return out

    monkeypatch.setattr(QwenPlanner, "forward", silent)
    assert main(["prove", *small]) == 1
    assert "detach" in capsys.readouterr().out


def test_info_tells_what_is_used(capsys):
    assert main(["info"]) == 0
    assert "extension" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "line, named",
    [
        ("train --dataset /nowhere", "/nowhere"),
        ("train --device tpu", "device"),
        ("train --resume /nowhere", "resume"),
        ("train --qwen /nowhere/qwen", "qwen"),
        ("eval /nowhere", "run"),
        ("report /nowhere", "run"),
        ("fly", "command"),
    ],
)
def test_bad_input_gets_one_sentence(line, named, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if line.startswith("train") else []
    assert main([*line.split(), *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qwen-fused: ") and named in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "line, named",
    [
        ("train --agent_lr x", "agent-lr"),
        ("train --no-such-flag 1", "no-such-flag"),
        ("train --batch-size 0", "batch_size must be a number above 0, got 0"),
        ("train --weights.risk nan", "weights.risk must be finite, got nan"),
        ("eval", "run"),
    ],
)
def test_wrong_flags_are_named_and_exit_with_2(line, named, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2 and named in capsys.readouterr().err.lower()


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 2 and "train" in capsys.readouterr().out


def test_help_does_not_load_transformers():
    code = "import sys; from qwen_fused.cli import main; main(['--help']); print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False")
