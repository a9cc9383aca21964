"""A question and its job reach another process as they were, with nothing of an answer in them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch
from forked_workers import StandIn, make_task

from qwen_fused.solver.question import Encoded, Job, Question, ReadPlanner, job_bytes, make_question, without_answers
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_planner import encode_task


def test_a_question_comes_back_bit_for_bit():
    task = make_task("task1", tests=2)
    encoded = tuple(Encoded(torch.randn(count, 6), torch.randn(count, 3) / 3) for count in (8, 1))
    again = Question.from_bytes(Question(without_answers(task), encoded, seconds=1.5).to_bytes())
    for one, other in zip(again.encoded, encoded, strict=True):
        assert torch.equal(one.prompt, other.prompt) and torch.equal(one.features, other.features)
    assert (again.task.id, again.seconds) == ("task1", 1.5)
    for pairs, others in ((again.task.train, task.train), (again.task.test, task.test)):
        assert all(np.array_equal(a.input, b.input) for a, b in zip(pairs, others, strict=True))
    assert all(np.array_equal(a.output, b.output) for a, b in zip(again.task.train, task.train, strict=True))


def test_no_answer_is_sent():
    task = make_task("task1", tests=2)
    assert all(pair.output is not None for pair in task.test)
    sent = make_question(StandIn(), task, SolveSettings()).to_bytes()
    plain = json.loads(sent)
    assert plain["test"] == [pair.input.tolist() for pair in task.test]
    changed = replace(task, test=tuple(replace(pair, output=np.zeros((1, 1), np.uint8)) for pair in task.test))
    assert make_question(StandIn(), changed, SolveSettings()).to_bytes() == sent


def test_a_job_comes_back_bit_for_bit():
    planner, settings = StandIn(), SolveSettings(steps=7, task_seconds=2.5, recolor="all")
    job = Job.from_bytes(job_bytes(planner, settings))
    assert job.settings == settings
    expected = planner.agent.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in job.agent.state_dict().items()) and expected


def test_what_qwen_reads_is_what_it_reads_where_it_trains(small_config):
    """The prompts that are sent are those that the planner's own `encode_task` makes."""
    from qwen_fused.planner.model import QwenPlanner

    planner = QwenPlanner(small_config())
    task = make_task("task1", pairs=3)
    expected = encode_task(planner, task, 8)
    question = Question.from_bytes(make_question(planner, task, SolveSettings()).to_bytes())
    # a planner that is being trained goes on as it was
    assert all(module.training for module in planner.modules())
    for tensor, other in zip(encode_task(ReadPlanner(planner.agent, question), task, 8), expected, strict=True):
        assert torch.equal(tensor, other)
