"""One task drawn: every cell in its colour, in the terminal and in the picture; a wrong name gets one sentence."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.cli.main import main
from qwen_fused.common.files import safe_name
from qwen_fused.report.draw_grids import ARC_COLORS
from qwen_fused.report.show import Row, describe_task, find_task, print_rows


class Answers:
    """The answer first, or only second."""

    def __init__(self, task, first: bool):
        self.answers, self.first = [pair.output for pair in task.test], first

    def predict(self, episodes, attempts):
        wrong, right = np.zeros_like(episodes[0].query), self.answers[episodes[0].index]
        return [[right, wrong] if self.first else [wrong, right]]

    def plan_steps(self, episode):
        return [episode.query, episode.query]


@pytest.fixture
def task(small_arc):
    return load_tasks(str(small_arc)).tasks[0]


def printed(rows, width: int, **options) -> str:
    file = io.StringIO()
    print_rows(rows, Console(file=file, width=width, **options))
    return file.getvalue()


def test_cells_have_their_digit_and_colour():
    rows = [Row("t", [("g", np.array([[1, 4]], np.uint8), ARC_COLORS)])]
    text = printed(rows, 80, force_terminal=True, color_system="truecolor")
    assert "48;2;30;147;255m1 " in text and "48;2;255;220;0m4 " in text
    assert "g 1x2" in printed(rows, 80)


def test_nothing_is_wider_than_the_terminal(task):
    rows = describe_task(task, Answers(task, True))
    for width in (40, 80, 200):
        lines = printed(rows, width).splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.count("step 1") for line in lines) == len(task.test)


@pytest.mark.parametrize(("first", "says"), [(True, "solved by attempt 1"), (False, "solved by attempt 2")])
def test_rows_of_a_task(task, first, says):
    rows = describe_task(task, Answers(task, first))
    assert len(rows) == len(task.train) + len(task.test)
    captions = [caption for caption, _, _ in rows[-1].grids]
    assert captions == ["input", "step 1", "step 2", "attempt 1", "attempt 2", "target", "errors"]
    assert says in rows[-1].title
    alone = describe_task(task)
    assert [caption for caption, _, _ in alone[-1].grids] == ["input", "target"]


def test_any_split_is_searched():
    for split in ("training", "evaluation"):
        task_id = load_tasks("arc1", split).tasks[3].id
        assert find_task("arc1", task_id).id == task_id


def test_show_a_runs_answer(small_arc, small_config, tmp_path, capsys, task):
    from qwen_fused.train.trainer import Trainer

    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    config = small_config()
    config.save(run / "config.yaml")
    Trainer(config, run).save()
    assert main(["show", task.id, "--run", str(run)]) == 0
    out = capsys.readouterr().out
    assert "demonstration 1" in out and "attempt 2" in out and "errors" in out
    assert (run / "show" / f"{task.id}.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["show", task.id, "--run", str(run.parent / "ones")]) == 2
    assert "did you mean one?" in capsys.readouterr().err


def test_without_a_run_nothing_is_written_unasked(small_arc, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", task.id, "--dataset", str(small_arc)]) == 0 and list(tmp_path.iterdir()) == []
    assert main(["show", task.id, "--dataset", str(small_arc), "--png", "t.png"]) == 0
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_names_get_one_sentence(small_arc, task, tmp_path, capsys):
    near = task.id[:-1]
    for line, says in [
        (["show", near, "--dataset", str(small_arc)], f"did you mean {task.id}?"),
        (["show", task.id, "--run", str(tmp_path / "none")], "run must be a run folder"),
        (["show", task.id, "--dataset", str(small_arc), "--png", str(tmp_path / "no" / "x.png")], "png must be"),
    ]:
        assert main(line) == 2
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "task_id", ["a/b", "../../escape", "日本", "", 'quote"x', "nul\0x", "<b>", "[bold]x[/]", "x" * 300]
)
def test_a_picture_never_leads_out_of_its_folder(tmp_path, task_id):
    name = safe_name(task_id)
    assert (tmp_path / f"{name}.png").resolve().parent == tmp_path.resolve()
    (tmp_path / f"{name}.png").touch()
    assert name != safe_name(task_id + " ") and safe_name(task_id) == name


def test_plain_ids_keep_their_names():
    assert [safe_name(name) for name in ("0d3d703e", "größe", "a-b_c.2")] == ["0d3d703e", "größe", "a-b_c.2"]


def test_finds_a_task_of_any_split(kaggle, tmp_path):
    """What eval finds, show finds; of two splits the one that knows the answers."""
    first = min(json.loads((kaggle / "arc-agi_test_challenges.json").read_text()))
    assert find_task(str(kaggle), first).test[0].output is not None
    pair = {"input": [[1]], "output": [[2]]}
    (tmp_path / "own.json").write_text(json.dumps({"one": {"train": [pair], "test": [pair]}, "none": {"train": []}}))
    assert len(find_task(str(tmp_path / "own.json"), "one").train) == 1
    with pytest.raises(ValueError, match='got .none.: .*task none: "train" must be a list of pairs'):
        find_task(str(tmp_path / "own.json"), "none")
