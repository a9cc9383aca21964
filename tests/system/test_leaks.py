"""No way from an answer to what is shown with its question, and none from a held-out task into training.

Real tasks are used, compared by content: a leak through another name or another index would be seen too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from qwen_fused.arc.episodes import (
    Episode,
    Pair,
    Task,
    augment,
    leave_one_out,
    load_tasks,
    test_episodes,
)
from qwen_fused.arc.sampler import EpisodeSampler
from qwen_fused.arc.split import shared_tasks, split_tasks


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, ...]:
    return load_tasks("arc1").tasks


def content(grid: np.ndarray) -> tuple:
    return grid.shape, grid.tobytes()


def shape_of(grid: np.ndarray) -> bytes:
    """A grid up to turning, mirroring and recolouring: what augmentation cannot change."""
    forms = []
    for side in (grid, grid[:, ::-1]):
        for turns in range(4):
            turned = np.rot90(side, turns)
            # colours numbered in the order in which they come
            _, first, which = np.unique(turned, return_index=True, return_inverse=True)
            rank = np.argsort(np.argsort(first))
            forms.append(bytes(turned.shape) + rank[which.ravel()].astype(np.uint8).tobytes())
    return min(forms)


def pairs_of(tasks: Iterable[Task]) -> list[Pair]:
    return [pair for task in tasks for pair in task.train + task.test]


def test_query_pair_is_not_among_its_demonstrations(tasks):
    for task in tasks:
        for episode in leave_one_out(task) + test_episodes([task]):
            shown = {(content(pair.input), content(pair.output)) for pair in episode.demonstrations}
            assert (content(episode.query), content(episode.answer)) not in shown
            assert all(pair.input is not episode.query for pair in episode.demonstrations)
            assert all(pair.output is not episode.answer for pair in episode.demonstrations)


def test_leave_one_out_takes_nothing_from_test_pairs(tasks):
    for task in tasks:
        test_pairs = {(content(pair.input), content(pair.output)) for pair in task.test}
        for episode in leave_one_out(task):
            assert len(episode.demonstrations) == len(task.train) - 1
            shown = {(content(pair.input), content(pair.output)) for pair in episode.demonstrations}
            assert not test_pairs & (shown | {(content(episode.query), content(episode.answer))})


def test_every_demonstration_comes_from_the_query_task(tasks):
    by_id = {task.id: task for task in tasks}
    sampler = EpisodeSampler(tasks, batch_size=16, seed=0, augment=0.0)
    for index in range(sampler.batches_per_epoch()):
        for episode in sampler.batch(0, index):
            train = by_id[episode.task_id].train
            assert episode.query is train[episode.index].input
            expected = [pair for number, pair in enumerate(train) if number != episode.index]
            assert list(episode.demonstrations) == expected


def test_changing_an_answer_changes_nothing_else_of_its_episode(tasks):
    for task in tasks[:50]:
        for index, pair in enumerate(task.train):
            other = Pair(pair.input, np.full((1, 1), 9, np.uint8))
            train = task.train[:index] + (other,) + task.train[index + 1 :]
            before = leave_one_out(task)[index].without_answer()
            after = leave_one_out(Task(task.id, train, task.test))[index].without_answer()
            assert before.query is after.query and before.demonstrations == after.demonstrations
            assert vars(before).keys() == vars(after).keys() and before.answer is after.answer is None


def test_augmentation_does_not_read_the_answer(tasks):
    """The generator is used alike with and without an answer, or the answer would show in the colours of the query."""
    for number, task in enumerate(tasks[:50]):
        episode = leave_one_out(task)[0]
        both = (episode, episode.without_answer())
        seen, blind = (augment((e,), np.random.default_rng(number))[0] for e in both)
        assert np.array_equal(seen.query, blind.query)
        for left, right in zip(seen.demonstrations, blind.demonstrations, strict=True):
            assert np.array_equal(left.input, right.input) and np.array_equal(left.output, right.output)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_tasks_never_enter_a_training_batch(tasks, seed):
    training, held_out = split_tasks(tasks, 0.1, seed)
    assert not {task.id for task in training} & {task.id for task in held_out}
    hidden = {shape_of(pair.input) + b">" + shape_of(pair.output) for pair in pairs_of(held_out)}
    # a few pairs of different tasks are alike up to colours by nature, such as small one-coloured grids
    hidden -= {shape_of(pair.input) + b">" + shape_of(pair.output) for pair in pairs_of(training)}
    assert len(hidden) > 100
    sampler = EpisodeSampler(training, batch_size=16, seed=seed)
    names = {task.id for task in training}
    for index in range(sampler.batches_per_epoch()):
        for episode in sampler.batch(0, index):
            assert episode.task_id in names
            for pair in (*episode.demonstrations, Pair(episode.query, episode.answer)):
                assert shape_of(pair.input) + b">" + shape_of(pair.output) not in hidden


def test_shape_of_sees_through_augmentation(tasks):
    """The check above rests on this: what augmentation changes, shape_of does not see, and no more than that."""
    episodes = [episode for task in tasks[:40] for episode in leave_one_out(task)[:1]]
    changed = [augment((episode,), np.random.default_rng(i))[0] for i, episode in enumerate(episodes)]
    assert any(not np.array_equal(a.query, b.query) for a, b in zip(episodes, changed, strict=True))
    assert all(shape_of(a.query) == shape_of(b.query) for a, b in zip(episodes, changed, strict=True))
    assert len({shape_of(episode.query) for episode in episodes}) > 35


def test_shared_tasks_are_found_by_content(tasks):
    """What ARC's own sets have in common; a set shares nothing with tasks it was split from."""
    evaluation = load_tasks("arc1", "evaluation").tasks
    assert not {task.id for task in tasks} & {task.id for task in evaluation}
    assert shared_tasks(tasks, evaluation) == ("070dd51e",)
    assert len(shared_tasks(load_tasks("arc2").tasks, evaluation)) == 376
    assert shared_tasks(*split_tasks(tasks, 0.1, 0)) == ()
    one = evaluation[0]
    renamed = Task("new", tuple(Pair(pair.input.copy(), pair.output.copy()) for pair in one.train), one.test)
    assert shared_tasks([one], [renamed]) == ("new",)
    query_only = Task("new", tasks[0].train, tuple(Pair(pair.input, None) for pair in one.test))
    assert shared_tasks([one], [query_only]) == ()


def test_blind_episode_holds_no_trace_of_the_answer(tasks):
    """Not by reference either: every array reachable from a blind episode is a demonstration's or the query."""
    for task in tasks[:50]:
        for episode in leave_one_out(task):
            blind = episode.without_answer()
            reachable = [getattr(blind, name) for name in vars(blind)]
            reachable += [grid for pair in blind.demonstrations for grid in vars(pair).values()]
            assert not any(value is episode.answer for value in reachable)
            assert isinstance(blind, Episode)
