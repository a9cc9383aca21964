"""A run begun with relative paths is evaluated, shown, exported and continued from any folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qwen_fused.cli.main import main
from qwen_fused.config import TrainConfig
from qwen_fused.train.located import located
from qwen_fused.train.loop import train


@pytest.fixture
def begun(small_config, small_arc, small_qwen, tmp_path, monkeypatch):
    """A run of relative paths, and the current folder another one afterwards."""
    here = tmp_path / "here"
    shutil.copytree(small_arc, here / "tasks")
    shutil.copytree(small_qwen, here / "qwen")
    task = sorted((here / "tasks").iterdir())[0]
    (here / "ids.txt").write_text(task.stem)
    (here / "more.json").write_text(json.dumps({"more": json.loads(task.read_text()) | {"test": [{"input": [[1]]}]}}))
    monkeypatch.chdir(here)
    settings = dict(dataset="tasks,more.json", qwen="qwen", held_out=Path("ids.txt"), max_batches=2, lora_rank=2)
    run = train(small_config(**settings))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return run, here, task.stem


def test_a_run_is_used_from_any_folder(begun, tmp_path, capsys):
    run, here, task = begun
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["dataset"] == f"{here / 'tasks'},{here / 'more.json'}" and config["qwen"] == str(here / "qwen")
    assert yaml.safe_load((run / "config.yaml").read_text())["held_out"] == str(here / "ids.txt")
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert main(["show", task, "--run", str(run), "--device", "cpu"]) == 0
    assert main(["export", str(run), "to"]) == 0
    assert json.loads(Path("to/adapter_config.json").read_text())["base_model_name_or_path"] == str(here / "qwen")
    assert main(["train", "--resume", str(run), "--max-batches", "3", "--device", "cpu"]) == 0
    assert "Continuing from" in capsys.readouterr().out


def test_the_same_paths_given_again_are_no_change(begun, monkeypatch):
    run, here, _ = begun
    monkeypatch.chdir(here)
    line = "train --dataset tasks,more.json --qwen qwen --max-batches 3 --device cpu --held-out ids.txt --resume"
    assert main([*line.split(), str(run)]) == 0
    assert main(["train", "--resume", str(run), "--dataset", "tasks", "--device", "cpu"]) == 2


def test_names_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(dataset="arc1,arc2", qwen="Qwen/Qwen2.5-0.5B")
    assert located(config) == config
    (tmp_path / "tiny").mkdir()
    (tmp_path / "a,b.json").touch()
    assert located(replace(config, qwen="tiny")).qwen == "tiny"
    assert located(replace(config, dataset="a,b.json")).dataset == str(tmp_path / "a,b.json")
    assert located(replace(config, dataset="nowhere")).dataset == "nowhere"
