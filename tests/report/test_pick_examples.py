"""What is shown of a run's answers: the same episodes each time, and examples of every kind, drawn in full."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_fused.arc.episodes import load_tasks, test_episodes
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.report.answers import plain_examples, read_examples
from qwen_fused.report.pick_examples import final_examples, watched_episodes, watched_examples
from qwen_fused.solver.evaluate import evaluate


@pytest.fixture(scope="module")
def arc1():
    return load_tasks("arc1").tasks


@pytest.fixture
def tasks(small_arc):
    return load_tasks(str(small_arc)).tasks


def test_watched_are_the_same_whatever_the_order(arc1):
    watched = watched_episodes(arc1)
    assert len({(e.task_id, e.index) for e in watched}) == 6
    assert [e.task_id for e in watched_episodes(arc1[::-1])] == [e.task_id for e in watched]
    sides = [e.side for e in watched]
    assert sides == sorted(sides) and sides[0] <= 3 and sides[-1] == 30
    assert len(watched_episodes(arc1[:1])) == len(arc1[0].test)


def test_watched_examples_are_the_evaluations_answers(small_config, tasks):
    model = QwenPlanner(small_config())
    watched, evaluation = watched_episodes(tasks, 3), evaluate(model, test_episodes(tasks))
    for episode, example in zip(watched, watched_examples(watched, evaluation), strict=True):
        assert example.task_id == episode.task_id and np.array_equal(example.input, episode.query)
        assert np.array_equal(example.predicted, model.predict([episode])[0][0])


def test_examples_of_every_kind(small_config, tasks):
    model = QwenPlanner(small_config())
    evaluation = evaluate(model, test_episodes(tasks))
    examples = final_examples(model, tasks, evaluation)
    cells = {(r.task_id, r.index): r.score.cells for r in evaluation.records}
    kinds = {kind: [cells[e.task_id, e.index] for e in examples if e.why == kind] for kind in (
        "nearest", "in between", "hardest")}  # fmt: skip
    assert [len(k) for k in kinds.values()] == [4, 4, 4]
    assert max(kinds["nearest"]) == max(cells.values()) and min(kinds["hardest"]) == min(cells.values())
    assert min(kinds["nearest"]) >= max(kinds["in between"]) >= min(kinds["in between"]) >= max(kinds["hardest"])
    shown = read_examples(plain_examples(examples, "x"), "x")[0]
    assert len(shown.plan) == 3 and len(shown.backward) == 4
    assert shown.backward[0].shape == shown.input.shape and shown.backward[1].shape == shown.target.shape


def test_few_episodes_are_shown_once(small_config, tasks):
    model = QwenPlanner(small_config())
    evaluation = evaluate(model, test_episodes(tasks[:2]))
    examples = final_examples(model, tasks[:2], evaluation)
    assert len(examples) == len({(e.task_id, e.index) for e in examples}) == len(evaluation.records)


def test_backward_plan_starts_from_the_answer(small_config, tasks):
    """It is the plan that training scores, and the forward one does not see the answer."""
    model = QwenPlanner(small_config())
    (episode, *_) = test_episodes(tasks)
    seen = {}
    forward = model.agent.forward

    def spy(*args, **kwargs):
        seen["target"] = kwargs.get("target")
        seen["plan"] = forward(*args, **kwargs)
        return seen["plan"]

    model.agent.forward = spy
    grids = model.backward_steps(episode)
    h, w = episode.answer.shape
    assert np.array_equal(seen["target"][0, :h, :w].numpy(), episode.answer)
    assert np.array_equal(grids[-1], seen["plan"].back_logits[0, -1, :, :h, :w].argmax(0).numpy())
    model.plan_steps(episode)
    assert seen["target"] is None
    assert model.training
