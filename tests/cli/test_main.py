"""The command line: the line people type works as it stands, and what is wrong gets one sentence and code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import qwen_fused
from qwen_fused.cli.main import main
from qwen_fused.common.typed_yaml import from_plain
from qwen_fused.config import TrainConfig


@pytest.fixture
def small(small_arc, small_qwen, tmp_path) -> list[str]:
    """Flags of a run of milliseconds."""
    return (
        f"--dataset {small_arc} --qwen {small_qwen} --val-fraction 0.25 --batch_size 4 --agent-channels 16 "
        "--prompt-dim 32 --policy-hidden 32 --plan-steps 2 --device cpu --max-batches 3 --ttt-seconds 0 "
        f"--out {tmp_path / 'runs'}"
    ).split()


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_the_line_people_type_trains_the_tiny_qwen(small, unevaluated, tmp_path):
    line = "train --epochs 10 --agent_lr 1e-5 --qwen_lr 5e-5 --device cpu"
    assert main([*line.split(), *small, "--qwen", "tiny"]) == 0
    config = TrainConfig.load(only_run(tmp_path) / "config.yaml")
    assert (config.epochs, config.agent_lr, config.qwen_lr) == (10, 1e-5, 5e-5)


def printed(arguments: list[str], capsys) -> TrainConfig:
    """What --print-config says, read back."""
    assert main([*arguments, "--print-config"]) == 0
    return from_plain(TrainConfig, yaml.safe_load(capsys.readouterr().out))


def test_the_line_people_type_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = f"train --epochs 10 --agent_lr 1e-5 --qwen_lr 5e-5 --device cuda --out {tmp_path}"
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("qwen-fused: device cuda needs") and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_are_over_the_file_and_the_file_is_over_the_preset(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("epochs: 7\nagent_lr: 3e-5\nweights: {risk: 0.25}\n")
    config = printed(
        f"train --agent_lr 4e-5 --config {tmp_path / 'c.yaml'} --preset seed --weights.ce 2".split(), capsys
    )
    # the flag, the file, the preset, the default
    assert (config.agent_lr, config.epochs, config.qwen_lr, config.seed) == (4e-5, 7, 5e-5, 0)
    assert (config.weights.ce, config.weights.risk, config.weights.agreement) == (2.0, 0.25, 0.5)
    assert not (tmp_path / "runs").exists()


def test_printed_configuration_is_a_configuration(tmp_path, capsys):
    first = printed(["train", "--preset", "qwen2.5-0.5b", "--max-minutes", "3", "--no-prove"], capsys)
    first.save(tmp_path / "c.yaml")
    for command in ("train", "prove"):
        assert printed([command, "--config", str(tmp_path / "c.yaml")], capsys) == first


def test_config_file_trains(small, unevaluated, tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size: 4\nmax_batches: 2\nplan_steps: 3\n")
    small = [flag for flag in small if flag not in ("--max-batches", "3")]
    assert main(["train", "--config", str(tmp_path / "c.yaml"), *small]) == 0
    config = TrainConfig.load(only_run(tmp_path) / "config.yaml")
    # 2 plan steps by flag, 3 by the file
    assert (config.max_batches, config.plan_steps) == (2, 2)


def test_resume_takes_no_other_configuration(tmp_path, capsys):
    TrainConfig().save(tmp_path / "config.yaml")
    assert main(["train", "--resume", str(tmp_path), "--preset", "tiny"]) == 2
    assert "resume must be alone" in capsys.readouterr().err


def test_resume_starts_from_the_runs_configuration(tmp_path, capsys):
    TrainConfig(epochs=3, seed=5).save(tmp_path / "config.yaml")
    config = printed(["train", "--resume", str(tmp_path), "--epochs", "4"], capsys)
    assert (config.epochs, config.seed, config.resume) == (4, 5, tmp_path)


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
    from qwen_fused.planner.model import QwenPlanner

    forward = QwenPlanner.forward

    def silent(self, batch, **options):
        out = forward(self, batch, **options)
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
        ("report /nowhere", "run must be a run folder"),
        ("export /nowhere new", "run must be a run folder"),
        ("fly", "command"),
        ("train --preset sede", "did you mean seed?"),
        ("train --config /nowhere.yaml", "/nowhere.yaml cannot be read"),
        ("prove --preset sede", "did you mean seed?"),
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
        ("train --weights.risk nan", "weights.risk must be a finite number of at least 0, got nan"),
        ("train --weights.ce -1", "weights.ce must be a finite number of at least 0, got -1.0"),
        ("eval", "run"),
    ],
)
def test_wrong_flags_are_named_and_exit_with_2(line, named, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2 and named in capsys.readouterr().err.lower()


@pytest.fixture
def untrained(tmp_path) -> Path:
    """A run folder that never saw a batch, of a dataset that has gone since."""
    TrainConfig(dataset=str(tmp_path / "gone")).save(tmp_path / "config.yaml")
    return tmp_path


@pytest.mark.parametrize(
    "line, says",
    [
        ("eval {run}", "run must be a run folder with a checkpoint, got {run}"),
        ("export {run} {run}/new", "run must be a run folder with a checkpoint, got {run}"),
        ("eval {run} --weights best", "weights must be last for a run that has not been evaluated, got best"),
        ("eval {run}/checkpoints", "run must be a run folder with a config.yaml, got {run}/checkpoints"),
        ("report {run}/checkpoints", "run must be a run folder with a config.yaml, got {run}/checkpoints"),
    ],
)
def test_a_wrong_run_is_named_as_run(line, says, untrained, capsys):
    (untrained / "checkpoints").mkdir()
    assert main(line.format(run=untrained).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qwen-fused: {says.format(run=untrained)}") and len(error.splitlines()) == 1
    assert not (untrained / "checkpoints" / "report.html").exists()


def test_what_a_run_lacks_since_is_told_of_the_run(small, tmp_path, capsys):
    data = Path(small[1])
    mine = tmp_path / "tasks"
    shutil.copytree(data, mine)
    assert main(["train", *small[2:], "--dataset", str(mine), "--no-prove"]) == 0
    shutil.rmtree(mine)
    run = only_run(tmp_path)
    capsys.readouterr()
    assert main(["eval", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"qwen-fused: run {run}: dataset must be")


@pytest.mark.parametrize("command", ["train", "eval", "export", "prove", "report", "show", "info"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"usage: qwen-fused {command}" in said and "PATH PATH" not in said


def test_output_that_nobody_reads():
    code = "import sys; from qwen_fused.cli.main import main; sys.exit(main(['train', '--print-config'] ))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=120) == 141 and process.stderr.read() == b""


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 2 and "train" in capsys.readouterr().out


def test_help_does_not_load_transformers():
    code = "import sys; from qwen_fused.cli.main import main; main(['--help']); print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_flags_of_a_run_are_in_groups(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "90"}
    line = [sys.executable, "-m", "qwen_fused", "prove", "--help"]
    said = subprocess.run(line, env=environment, capture_output=True, check=True).stdout.decode(encoding)
    places = [
        said.index(text)
        for text in (
            "Where a configuration starts", "--preset", "Which episodes train", "--dataset", "--held-out",
            "The backbone, and how", "--qwen ", "Widths of prompt", "--agent-channels", "What a plan is scored by",
            "--hard-mode", "Learning rates and clipping", "--clip", "What a step runs on", "--backend",
            "The run folder", "--trackers",
        )
    ]  # fmt: skip
    assert places == sorted(places)


def test_version_and_a_slip_in_a_command(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"qwen-fused {qwen_fused.__version__}\n"
    assert main(["evla"]) == 2
    assert capsys.readouterr().err.endswith("got 'evla'; did you mean eval?\n")


@pytest.mark.parametrize(
    "flag", ["--lora-rank 100000", "--agent-channels 9999999", "--plan-steps 10000000", "--prompt-dim 99999999"]
)
def test_no_flag_keeps_the_program_busy(flag, tmp_path, capsys):
    started = time.monotonic()
    try:
        code = main(["train", *flag.split(), "--out", str(tmp_path / "runs"), "--device", "cpu"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and flag.split()[0].strip("-").replace("-", "_") in capsys.readouterr().err
    assert time.monotonic() - started < 20 and not list((tmp_path / "runs").glob("*"))


def test_piped_output_has_no_bars(tmp_path, small_qwen):
    """transformers draws a bar while weights load, on stderr too."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")}
    code = (
        "import sys; from qwen_fused.cli import main as cli\n"
        "def load(arguments):\n"
        "    from qwen_fused.qwen.backbone import load_backbone; load_backbone(arguments[0]); return 0\n"
        "cli.COMMANDS['load'] = (load, ''); sys.exit(cli.main(['load', sys.argv[1]]))"
    )
    line = [sys.executable, "-c", code, str(small_qwen)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "" and "%" not in done.stderr and "Loading" not in done.stderr
