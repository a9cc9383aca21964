"""What a continuation takes, what it refuses, and what it puts aside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import rows

from qwen_fused.cli import main as cli
from qwen_fused.config import TrainConfig
from qwen_fused.report.run_log import RunLog
from qwen_fused.train import loop, resume
from qwen_fused.train.checkpoint import list_checkpoints, read_state, write_state


@pytest.fixture(scope="module")
def trained(config_in, tmp_path_factory) -> Iterator[Path]:
    """A run of six batches with checkpoints after 2, 4 and 6; in this module no run is evaluated at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", lambda *args: None)
        yield loop.train(config_in(tmp_path_factory.mktemp("runs"), max_batches=6, checkpoint_every=2, qwen_lr=3e-4))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def again(run):
    """Keyword changes -> the run continued, by two batches; returns train.log."""

    def make(source: Path = run, **changes) -> str:
        config = TrainConfig.load(run / "config.yaml")
        loop.train(replace(config, **{"resume": source, "max_batches": 8, **changes}))
        return (run / "train.log").read_text()

    return make


def checkpoints(run: Path) -> list[str]:
    return [path.name[5:11].lstrip("0") for path in list_checkpoints(run / "checkpoints")]


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit of the header": lambda path: flip(path, 0.001),
    "a bit of a weight": lambda path: flip(path, 0.5),
    "the last bit": lambda path: flip(path, 0.9999999),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_gives_way_to_the_one_before_it(run, again, damage):
    before = rows(run)
    DAMAGE[damage](run / "checkpoints" / "step-000006.safetensors")
    log = again()
    assert "step-000006.safetensors" in log and "the one before it is taken" in log
    assert "step-000004.safetensors at batch 4" in log
    after = rows(run)
    assert after[:6] == before and [row["step"] for row in after] == list(range(1, 9))
    assert checkpoints(run) == ["2", "4", "6", "8"]
    assert [path.name for path in (run / "checkpoints" / resume.SET_ASIDE).iterdir()] == ["step-000006.safetensors"]


def test_damaged_checkpoint_named_itself_is_refused(run, again):
    path = run / "checkpoints" / "step-000006.safetensors"
    flip(path, 0.5)
    with pytest.raises(ValueError, match="step-000006.safetensors is damaged: .* checksum"):
        again(path)


def test_only_damaged_checkpoints_are_refused(run, again, capsys):
    for path in list_checkpoints(run / "checkpoints"):
        flip(path, 0.5)
    for command in (["train", "--resume", str(run)], ["eval", str(run)]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert "no checkpoint that is whole" in error and all(f"step-00000{k}" in error for k in (2, 4, 6))


def test_older_checkpoint_puts_later_ones_aside(run, again):
    log = again(run / "checkpoints" / "step-000002.safetensors", max_batches=3, keep_checkpoints=2)
    assert "Put aside in" in log and "step-000004.safetensors, step-000006.safetensors" in log
    # the checkpoint of now is not taken for the oldest, and deleted
    assert checkpoints(run) == ["2", "3"] and [row["step"] for row in rows(run)] == [1, 2, 3]
    again(max_batches=4)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("source", ["checkpoints", "checkpoints/step-000006.safetensors"])
def test_run_is_known_by_what_is_in_it(run, again, source):
    assert "at batch 6" in again(run / source)
    assert len(rows(run)) == 8


def test_best_weights_alone_are_refused(run, again):
    path = run / "checkpoints" / "best.safetensors"
    write_state(path, {"model": read_state(run / "checkpoints" / "step-000006.safetensors")["model"]})
    with pytest.raises(ValueError, match="best.safetensors, which holds weights only"):
        again(path)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"qwen_lr": 1e-5}, "qwen_lr was 0.0003, is 1e-05"),
        ({"batch_size": 8, "seed": 1}, "batch_size was 4, is 8; seed was 0, is 1"),
        ({"epochs": 9}, "epochs was 8, is 9"),
    ],
)
def test_changed_setting_is_refused_by_its_name(run, again, changes, sentence):
    before = [(run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "train.log")]
    with pytest.raises(ValueError, match=f"not be the same run.*{sentence}.*--resume-changed"):
        again(**changes)
    assert before == [(run / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "train.log")]


def test_resume_changed_takes_what_is_given_now(run, again, capsys):
    assert cli.main(["train", "--resume", str(run), "--qwen-lr", "1e-5", "--max-batches", "7"]) == 2
    assert "qwen_lr was 0.0003, is 1e-05" in capsys.readouterr().err
    flags = ["--qwen-lr", "1e-5", "--max-batches", "7", "--resume-changed"]
    assert cli.main(["train", "--resume", str(run), *flags]) == 0
    assert "Changed: qwen_lr was 0.0003, is 1e-05." in (run / "train.log").read_text()
    saved = TrainConfig.load(run / "config.yaml")
    assert (saved.qwen_lr, saved.resume, saved.resume_changed) == (1e-5, None, False)
    assert rows(run)[-1]["lr_qwen"] < 1e-5
    # and it is the run's own from now on
    assert cli.main(["train", "--resume", str(run), "--max-batches", "8", "--no-prove"]) == 0


def test_every_setting_is_free_or_refused():
    """A setting that is added later is refused until somebody says that it changes nothing."""
    assert {f for f in TrainConfig.__dataclass_fields__} > resume.MAY_CHANGE
    assert not resume.MAY_CHANGE & {
        "qwen",
        "seed",
        "dataset",
        "precision",
        "qwen_lr",
        "batch_size",
        "epochs",
        "weights",
    }


def test_free_settings_change_at_will(run, again):
    log = again(log_every=1, checkpoint_every=1, keep_checkpoints=1, eval_every=1, prove=False, on_nonfinite="skip")
    assert "Changed" not in log and checkpoints(run) == ["8"]


def test_shape_that_does_not_fit_is_one_sentence(run, again):
    with pytest.raises(ValueError, match=r"step-000006.safetensors does not fit the configuration: .*size mismatch"):
        again(prompt_dim=16, resume_changed=True)


def test_changed_tasks_are_refused(trained, small_config, small_arc, tmp_path):
    tasks = Path(shutil.copytree(small_arc, tmp_path / "tasks"))
    config = small_config(max_batches=2, dataset=str(tasks))
    folder = loop.train(config)
    victim = sorted(tasks.iterdir())[3]
    content = json.loads(victim.read_text())
    content["train"][0]["input"][0][0] ^= 1
    victim.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tasks, or their division .* are others.*--resume-changed"):
        loop.train(replace(config, max_batches=4, resume=folder))
    loop.train(replace(config, max_batches=4, resume=folder, resume_changed=True))
    assert len(rows(folder)) == 4


def rewrite_fingerprint(run: Path, **changes: str) -> None:
    path = run / "checkpoints" / "step-000006.safetensors"
    state = read_state(path)
    write_state(path, {**state, "origin": {**state["origin"], **changes}})


def test_another_version_is_refused_unless_told(run, again):
    rewrite_fingerprint(run, version="0.0.9")
    with pytest.raises(ValueError, match="qwen-fused was 0.0.9, is .*--resume-changed"):
        again()
    assert "Changed: qwen-fused was 0.0.9" in again(resume_changed=True)


@pytest.mark.parametrize("version", resume.RESUMES_FROM)
def test_versions_whose_runs_go_on_are_not_refused(run, again, monkeypatch, version):
    monkeypatch.setattr("qwen_fused.__version__", "9.0.0")
    rewrite_fingerprint(run, version=version, code="0")
    log = again()
    assert f"Begun by qwen-fused {version}, which 9.0.0 continues, but for last bits of clipped gradients." in log
    assert "Changed" not in log and "The code is not" not in log
    # what it writes is its own
    assert read_state(list_checkpoints(run / "checkpoints")[-1])["origin"]["version"] == "9.0.0"


@pytest.fixture(scope="module")
def before_agents(config_in, tmp_path_factory) -> Iterator[Path]:
    """A run of four batches of the agent of runs before 0.3, with checkpoints after 2 and 4; it names no agent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish", lambda *args: None)
        changes = dict(agent="conv", max_batches=4, checkpoint_every=2)
        run = loop.train(config_in(tmp_path_factory.mktemp("runs"), **changes))
        drop_agent(run)
        yield run


def drop_agent(run: Path) -> None:
    plain = yaml.safe_load((run / "config.yaml").read_text())
    assert plain.pop("agent") == "conv"
    (run / "config.yaml").write_text(yaml.safe_dump(plain))


def test_run_that_names_no_agent_resumes_bitwise(before_agents, tmp_path, capsys):
    run = Path(shutil.copytree(before_agents, tmp_path / "run"))
    unbroken, flags = rows(run), ["--max-batches", "4", "--no-prove"]
    checkpoint = run / "checkpoints" / "step-000002.safetensors"
    assert cli.main(["train", "--resume", str(checkpoint), "--agent", "lines", *flags]) == 2
    assert "agent was conv, is lines" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(checkpoint), *flags]) == 0
    assert rows(run) == unbroken and "Changed" not in (run / "train.log").read_text()
    last = [read_state(folder / "checkpoints" / "step-000004.safetensors")["model"] for folder in (before_agents, run)]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())
    # from now on it names it
    assert TrainConfig.load(run / "config.yaml").agent == "conv"


def test_run_that_names_no_agent_answers_and_exports(before_agents, tmp_path, small_arc, capsys):
    run = Path(shutil.copytree(before_agents, tmp_path / "run"))
    task = sorted(small_arc.iterdir())[0].stem
    for command in (["eval", run], ["show", task, "--run", run], ["report", run], ["export", run, tmp_path / "qwen"]):
        assert cli.main([str(word) for word in command]) == 0, command
    out = capsys.readouterr().out
    assert all(said in out for said in ("pass@1", "Picture: ", "Report: ", "Exported: "))


@pytest.mark.parametrize("command", ["eval {run} --ttt-steps 2", "solve {tasks} --run {run} --out {out}"])
def test_run_that_names_no_agent_is_not_trained_on_a_task(before_agents, tmp_path, small_arc, capsys, command):
    line = command.format(run=before_agents, tasks=small_arc, out=tmp_path / "out")
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert "training on a task needs a run with --agent lines, got one with conv" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_torch_and_other_sources_are_told(run, again):
    rewrite_fingerprint(run, torch="2.9.0", code="0")
    log = again()
    assert "torch was 2.9.0, is" in log and "The code is not what wrote" in log


def test_missing_rows_are_told(run, again):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:5] + [lines[5][:40]]))
    assert "metrics.jsonl has rows of 4 of 6 batches: the others are lost" in again()


def test_evaluation_falls_back_and_says_so(run, capsys):
    flip(run / "checkpoints" / "step-000006.safetensors", 0.5)
    assert cli.main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step-000006.safetensors is damaged" in out and "pass@1" in out


def test_resume_drops_rows_after_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": k}) for k in (1, 2, 3)] + ['{"step": 4, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    RunLog(tmp_path, resume_step=2).close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
