"""The page stands alone, says the figures that the run has, and is drawn from whatever part of a run there is."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from report_runs import make_run, metrics_row

from qwen_fused.arc.episodes import test_episodes
from qwen_fused.cli.main import main
from qwen_fused.proof.prove import prove
from qwen_fused.report.answers import Example, write_examples
from qwen_fused.report.page import write_report
from qwen_fused.report.run_files import read_gradients, read_metrics, read_predictions

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """What a page refers to, its ids, and its text; fails on a tag that closes another."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text())
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not {"style", "script"} & set(self.open):
            self.words.append(text)


@pytest.fixture(scope="module")
def reported(tmp_path_factory, held_out) -> Path:
    """A whole run with its report, written over an earlier one's picture: to read, not to change."""
    folder = make_run(tmp_path_factory.mktemp("run"), held_out)
    (folder / "report").mkdir()
    (folder / "report" / "example-99.png").write_bytes(b"of an earlier report")
    assert write_report(folder) == folder / "report.html"
    return folder


def test_page_stands_alone(reported, held_out):
    path = reported / "report.html"
    page = Page(path)
    # nothing is fetched: every reference is data or a place in the page
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    text = path.read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "fetch(" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 11
    # 12 examples: input, 5 steps, predicted, target, errors, the backward plan, and two for each demonstration;
    # 6 films: input, three moments, target
    assert page.tags.count("img") == 12 * (9 + 6) + 2 * sum(len(task.train) for task in held_out[:12]) + 6 * 5
    assert path.stat().st_size < 1_000_000


def test_svg_takes_its_colours_from_the_page(tmp_path, held_out):
    text = write_report(make_run(tmp_path, held_out, evaluated=False)).read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) == 9
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    for svg in svgs:
        ElementTree.fromstring(svg)
        # but for the black that matplotlib writes for clip paths and unstroked shapes, no colour is fixed
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
        for variable in set(re.findall(r"var\((--[\w-]+)\)", svg)):
            assert f"{variable}:" in light and f"{variable}:" in dark


def test_figures_are_those_of_the_run(reported, held_out):
    page = Page(reported / "report.html").text
    episodes = test_episodes(held_out)
    assert f"{len(episodes[::3])} of {len(episodes)}" in page
    result = json.loads((reported / "evaluation.json").read_text())["validation"]
    assert 0 < result["copy_cell_accuracy"] < result["cell_accuracy"] < 1
    for key in ("pass_at_1", "cell_accuracy", "copy_cell_accuracy", "size_accuracy"):
        assert f"{100 * result[key]:.1f} %" in page
    # batches 71 to 120: 5 - 0.01 * 95.5
    assert "Loss 4.045 first 10 batches: 4.945" in page
    assert "Qwen_grad 2.00e-05 never 0 after the first batch" in page
    assert "Mask_ratio 0.5" in page and "Reward 0.25" in page and "Episodes/s 12.5" in page
    # 4.495 against 4.945
    assert "batches 41 to 60 4.495 −9.1 % ✗ −11 %" in page
    assert "batches 91 to 110 3.995 −19.2 % ✓ −19 %" in page
    assert "Qwen tiny on arc1, seed 3, batches of 16, fp32. 120 batches logged." in page


def test_truncated_prompts_are_told_with_the_flag_to_change(tmp_path, held_out):
    folder = make_run(tmp_path, held_out, batches=4, evaluated=False)
    assert "--max-prompt-tokens" not in Page(write_report(folder)).text
    # 0, 25, 0 and 50 % of four batches; a row of an older version says nothing
    rows = [{**metrics_row(k), "truncated": share} for k, share in enumerate((0.0, 0.25, 0.0, 0.5), start=1)]
    rows.append({key: value for key, value in metrics_row(5).items() if key != "truncated"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(folder)).text.replace("\u00a0", " ")
    assert "18.8 % of the batches' prompts had no room for each demonstration. A larger --max-prompt-tokens" in page
    (folder / "prompts.json").write_text(json.dumps({"told": "Cut to 512 tokens: 3 of 9 training prompts."}))
    assert "each demonstration. Cut to 512 tokens: 3 of 9 training prompts." in Page(write_report(folder)).text


def test_examples_say_what_was_solved(reported, held_out):
    page = Page(reported / "report.html").text
    for number, episode in enumerate(test_episodes(held_out)[:12]):
        place = f"{episode.task_id} test input {episode.index + 1}"
        verdict = re.search(rf"{place} (✓ solved|[\d.]+ % of cells right)", page)
        assert verdict and (verdict[1] == "✓ solved") == (number % 3 == 0)
    assert page.count("demonstrations") == 12


def test_films_show_each_moment(reported, tmp_path):
    page = Page(reported / "report.html").text
    films = page[page.index("Held-out tasks over time") : page.index("Examples: nearest")]
    shown = read_predictions(reported / "predictions.jsonl")
    for first, last in zip(shown[0], shown[100], strict=True):
        told = f"batch 0 {100 * first.cells_right:.1f} % batch 50 {100 * last.cells_right:.1f} % batch 100"
        assert told in films.replace("\u00a0", " ")
    # one moment is no film
    first_line = (reported / "predictions.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "predictions.jsonl").write_text(first_line)
    assert "over time" not in Page(write_report(tmp_path)).text


def test_hardest_tasks_are_listed(reported):
    page = Page(reported / "report.html").text.replace("\u00a0", " ")
    records = json.loads((reported / "evaluation.json").read_text())["validation"]["records"]
    worst = min(records, key=lambda r: (r["score"]["cells"], r["task_id"]))
    assert f"Size right {worst['task_id']} {100 * worst['score']['cells']:.1f} %" in page


def test_rows_of_gradients_and_predictions(tmp_path):
    path = tmp_path / "g.jsonl"
    path.write_text('{"step": 1, "norms": {"layer 0": 2, "other": null}}\n{"step": 2}\n{"step": 3, "norms": {"la')
    (row,) = read_gradients(path)
    assert row["step"] == 1 and row["norms"]["layer 0"] == 2 and np.isnan(row["norms"]["other"])
    path.write_text('{"step": 1, "examples": []}\n{"step": 1, "examples": 3}\n')
    with pytest.raises(ValueError, match="step 1 must be a list, got int"):
        read_predictions(path)


def test_picture_of_a_run(tmp_path, report_run, capsys):
    picture = tmp_path / "run.png"
    assert main(["report", str(report_run), "--picture", str(picture)]) == 0
    assert matplotlib.image.imread(picture).shape[1] == 1210
    (report_run / "gradients.jsonl").unlink()
    assert main(["report", str(report_run), "--picture", str(picture)]) == 2
    assert "with nothing in gradients.jsonl" in capsys.readouterr().err


def test_gradient_that_does_not_arrive_is_said(tmp_path):
    rows = [metrics_row(step) | {"qwen_grad": 0.0} for step in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report(tmp_path)
    assert "Qwen_grad 0 0 in 29 of 29 batches" in Page(path).text
    assert (tmp_path / "report" / "gradients.png").exists()


def test_pictures_beside_the_page(reported):
    names = {file.name for file in (reported / "report").iterdir()}
    curves = {"loss", "loss-parts", "qwen-grad", "gradients", "mask-ratio", "reward", "accuracy", "speed"}
    drawn = curves | {"layers", "sizes", "tasks"} | {f"example-{i:02d}" for i in range(1, 13)}
    assert names == {f"{name}.png" for name in drawn}
    assert all((reported / "report" / name).read_bytes()[:4] == b"\x89PNG" for name in names)


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (None, "0 batches logged. Not evaluated yet."),
        ("", "No batch has been logged yet."),
        (json.dumps(metrics_row(1)) + "\n", "1 batches logged."),
        (json.dumps(metrics_row(1)) + "\n" + json.dumps(metrics_row(2))[:40], "1 batches logged."),
        ('{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n', "Loss –"),
        ('{"step": 1, "loss": null}\n\nnot json\n[]\n{"loss": 1}\n', "1 batches logged."),
        ('{"step": 1, "reward": 0.5}\n', "Reward 0.5"),
        ("\x00\udcff", "0 batches logged."),
    ],
)
def test_any_part_of_a_run_can_be_drawn(tmp_path, metrics, says):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_bytes(metrics.encode(errors="surrogateescape"))
    assert says in Page(write_report(tmp_path)).text


def test_read_metrics_columns(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "extra": 3.5}\n{"step": 3, "lo')
    columns = read_metrics(tmp_path / "m.jsonl")
    assert list(columns) == ["step", "loss", "extra"]
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_array_equal(columns["loss"], [2, np.nan])
    np.testing.assert_array_equal(columns["extra"], [np.nan, 3.5])


def test_proof_ladder_of_a_broken_loop(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def loss():
        return model[1](model[0](torch.ones(2, 3)).detach()).pow(2).mean()

    proof = prove(loss, model, torch.optim.SGD(model.parameters(), lr=0.1))
    (tmp_path / "proof.json").write_text(json.dumps(proof.to_dict()))
    page = Page(write_report(tmp_path)).text
    assert "Does the gradient reach Qwen? Broken ✓ declared 4 parameters" in page
    assert "✗ connected 2 of 4 parameters get no gradient: 0.weight, 0.bias" in page
    cut = loss.__code__.co_firstlineno + 1
    assert f"Cut by Tensor.detach at {__file__}:{cut}" in page and "model[0](torch.ones(2, 3)).detach()" in page


def test_rung_that_was_not_judged_is_not_ok(tmp_path):
    rungs = {"correct": {"ok": None, "detail": "not judged: the loss is random"}}
    (tmp_path / "proof.json").write_text(json.dumps({"ok": False, "rungs": rungs, "cut": None}))
    page = Page(write_report(tmp_path)).text
    assert "– correct not judged: the loss is random" in page and "✓" not in page


def test_names_are_text_and_nothing_more(tmp_path):
    hostile = "<script>alert(1)</script>$x^{"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"qwen": hostile, "dataset": "'\"><b>"}))
    grid = np.zeros((1, 1), np.uint8)
    write_examples(tmp_path / "examples.json", [Example(hostile, 0, input=grid, target=None, predicted=grid)])
    page = Page(write_report(tmp_path))
    assert page.tags.count("script") == 1 and page.text.count(hostile) == 3
    assert "no answer known" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", "{", "evaluation.json cannot be read"),
        ("evaluation.json", "[]", "evaluation.json must hold a dict, got a list"),
        ("evaluation.json", '{"validation": {"scored": 1}}', 'set "validation" must have episodes, tasks'),
        ("examples.json", "{}", "examples.json must hold a list, got a dict"),
        ("examples.json", "[7]", r"examples.json\[0\] must have task_id, .*, got int"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "!!python/object/apply:os.getcwd []", "config.yaml cannot be read"),
        ("proof.json", '{"rungs": [1]}', "proof.json: rungs must be"),
    ],
)
def test_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="must be a run folder"):
        write_report(tmp_path / "missing")
