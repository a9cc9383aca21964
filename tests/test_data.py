"""Held-out tasks stay out, every pair asks once per epoch, batches repeat exactly, and no grid is resized."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fused import data
from qwen_fused.data import IGNORE, Episode, EpisodeSampler, Pair, Task, augment, collate, leave_one_out


def make_tasks(count: int, seed: int = 0) -> list[Task]:
    rng = np.random.default_rng(seed)

    def grid() -> np.ndarray:
        return rng.integers(0, 10, rng.integers(1, 31, size=2)).astype(np.uint8)

    def pairs(number: int) -> tuple[Pair, ...]:
        return tuple(Pair(grid(), grid()) for _ in range(number))

    return [Task(f"task{i:03d}", pairs(int(rng.integers(2, 6))), pairs(1)) for i in range(count)]


def same_episodes(left: list[Episode], right: list[Episode]) -> bool:
    def content(episode: Episode) -> tuple:
        grids = [grid for pair in episode.demonstrations for grid in (pair.input, pair.output)]
        grids += [episode.query, episode.answer]
        return (episode.task_id, episode.index, [grid.tolist() for grid in grids])

    return [content(episode) for episode in left] == [content(episode) for episode in right]


def test_split_holds_out_whole_tasks_whatever_the_order():
    tasks = make_tasks(50)
    training, held_out = data.split_tasks(tasks, 0.1, 0)
    assert len(held_out) == 5
    assert sorted(task.id for task in training + held_out) == [task.id for task in tasks]
    again = data.split_tasks(tasks[::-1], 0.1, 0)
    assert [task.id for task in again[1]] == [task.id for task in held_out]
    assert [task.id for task in data.split_tasks(tasks, 0.1, 1)[1]] != [task.id for task in held_out]
    # the same in every process: python's own hash() would not be
    assert [int(task.id[4:]) for task in held_out] == [1, 2, 25, 36, 44]
    # growing the held-out part only adds to it
    assert {task.id for task in held_out} < {task.id for task in data.split_tasks(tasks, 0.3, 0)[1]}


def test_split_edges():
    tasks = make_tasks(4)
    assert data.split_tasks(tasks, 0.0, 0) == (tuple(tasks), ())
    assert len(data.split_tasks(tasks, 0.01, 0)[1]) == 1
    with pytest.raises(ValueError, match="leaves none to train on"):
        data.split_tasks(tasks, 0.99, 0)
    with pytest.raises(ValueError, match="different ids, got task001"):
        data.split_tasks([*tasks, tasks[1]], 0.5, 0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1.0"):
        data.split_tasks(tasks, 1.0, 0)


def test_without_answer_keeps_the_question():
    (task,) = make_tasks(1)
    for episode in leave_one_out(task) + data.test_episodes([task]):
        blind = episode.without_answer()
        assert blind.answer is None and episode.answer is not None
        assert blind.query is episode.query and blind.demonstrations is episode.demonstrations


def symmetries(grid: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(side, turns) for side in (grid, grid[:, ::-1]) for turns in range(4)]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32))
def test_augment_changes_every_grid_in_the_same_way(seed):
    rng = np.random.default_rng(seed)
    # every colour once, so that a symmetry fixes what each colour became
    marked = np.arange(10, dtype=np.uint8).reshape(2, 5)
    grids = [marked] + [rng.integers(0, 10, rng.integers(1, 6, 2)).astype(np.uint8) for _ in range(5)]
    episode = Episode("t", (Pair(grids[2], grids[3]), Pair(grids[4], grids[5])), grids[0], grids[1], 1)
    after = augment(episode, rng)
    new = [after.query, after.answer]
    new += [grid for pair in after.demonstrations for grid in (pair.input, pair.output)]

    def explains(number: int) -> bool:
        image = symmetries(marked)[number]
        if image.shape != new[0].shape:
            return False
        recolor = np.zeros(10, np.uint8)
        recolor[image] = new[0]
        return recolor[0] == 0 and all(
            np.array_equal(recolor[symmetries(old)[number]], grid) for old, grid in zip(grids, new, strict=True)
        )

    assert any(explains(number) for number in range(8))
    assert (after.task_id, after.index) == ("t", 1)
    assert sorted(new[0].ravel()) == list(range(10))


def test_augment_reaches_all_symmetries_and_keeps_unknown_answers():
    grid = np.array([[0, 0, 0], [0, 0, 1]], np.uint8)
    episode = Episode("t", (), grid, None, 0)
    shapes, colors = set(), set()
    for seed in range(300):
        after = augment(episode, np.random.default_rng(seed))
        assert after.answer is None
        shapes.add((after.query > 0).astype(int).tobytes() + bytes(after.query.shape))
        colors.add(int(after.query.max()))
    assert len(shapes) == 8 and colors == set(range(1, 10))
    assert grid.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 16), (7, 1), (30, 16), (32, 4)])
def test_every_pair_asks_once_per_epoch(count, batch_size):
    tasks = make_tasks(count)
    sampler = EpisodeSampler(tasks, batch_size=batch_size, seed=3)
    pairs = sum(len(task.train) for task in tasks)
    assert sampler.batches_per_epoch() == -(-pairs // batch_size)
    for epoch in (0, 1):
        batches = [sampler.batch(epoch, index) for index in range(sampler.batches_per_epoch())]
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size
        asked = Counter((episode.task_id, episode.index) for batch in batches for episode in batch)
        assert asked == Counter((task.id, index) for task in tasks for index in range(len(task.train)))
    with pytest.raises(ValueError, match="has no batch"):
        sampler.batch(0, sampler.batches_per_epoch())
    with pytest.raises(ValueError, match="epoch -1"):
        sampler.batch(-1, 0)


def test_batch_depends_on_seed_epoch_and_index_alone():
    tasks = make_tasks(20)
    first = EpisodeSampler(tasks, batch_size=8, seed=5)
    straight = [first.batch(epoch, index) for epoch in (0, 1) for index in range(4)]
    # another sampler, other order of tasks, batches asked for backwards
    second = EpisodeSampler(tasks[::-1], batch_size=8, seed=5)
    backwards = [second.batch(epoch, index) for epoch in (1, 0) for index in range(3, -1, -1)][::-1]
    assert all(same_episodes(a, b) for a, b in zip(straight, backwards, strict=True))
    assert not same_episodes(straight[0], straight[4])
    assert not same_episodes(straight[0], EpisodeSampler(tasks, batch_size=8, seed=6).batch(0, 0))


def test_augmentation_differs_from_place_to_place_and_epoch_to_epoch():
    grid = np.arange(10, dtype=np.uint8).reshape(2, 5)
    tasks = [Task(f"t{i}", (Pair(grid, grid), Pair(grid, grid)), ()) for i in range(50)]
    sampler = EpisodeSampler(tasks, batch_size=10, seed=0)
    queries = [e.query.tobytes() for epoch in (0, 1) for index in range(10) for e in sampler.batch(epoch, index)]
    assert len(set(queries)) == len(queries)
    plain = EpisodeSampler(tasks, batch_size=10, seed=0, augment=0.0)
    assert all(episode.query is grid for episode in plain.batch(0, 0))
    # the same pairs in the same places, augmented or not
    for index in range(10):
        names = [[(e.task_id, e.index) for e in s.batch(0, index)] for s in (sampler, plain)]
        assert names[0] == names[1]


def test_augment_is_a_share_of_the_episodes():
    grid = np.arange(10, dtype=np.uint8).reshape(2, 5)
    tasks = [Task(f"t{i:03d}", (Pair(grid, grid), Pair(grid, grid)), ()) for i in range(200)]
    for share, low, high in ((0.0, 0, 0), (0.3, 80, 160), (1.0, 400, 400)):
        sampler = EpisodeSampler(tasks, batch_size=40, seed=0, augment=share)
        changed = [episode.query is not grid for index in range(10) for episode in sampler.batch(0, index)]
        assert low <= sum(changed) <= high
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"augment must be in \[0, 1\], got {wrong}"):
            EpisodeSampler(tasks, batch_size=1, seed=0, augment=wrong)


def padding(batches: list[list[Episode]]) -> float:
    """Share of canvas cells that neither query nor answer covers."""
    canvas = used = 0
    for batch in batches:
        canvas += collate(batch).query.numel()
        used += sum(np.maximum(e.query.shape, e.answer.shape).prod() for e in batch)
    return 1 - used / canvas


def test_bucketing_saves_padding_on_real_tasks():
    sampler = EpisodeSampler(data.load_tasks("arc1").tasks, batch_size=16, seed=0)
    batches = [sampler.batch(0, index) for index in range(sampler.batches_per_epoch())]
    episodes = [episode for batch in batches for episode in batch]
    shuffled = [episodes[i] for i in np.random.default_rng(0).permutation(len(episodes))]
    random_batches = [shuffled[i : i + 16] for i in range(0, len(shuffled), 16)]
    assert padding(batches) < 0.2 and padding(random_batches) > 0.6
    # sizes come mixed over the epoch, not small to large
    sides = np.array([max(episode.side for episode in batch) for batch in batches])
    assert abs(np.corrcoef(sides, np.arange(len(sides)))[0, 1]) < 0.3
    # nearly all batches are of 16 different tasks
    repeats = sum(len(batch) - len({episode.task_id for episode in batch}) for batch in batches)
    assert repeats < 0.1 * len(episodes)


def test_sampler_rejects_bad_input():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        EpisodeSampler(make_tasks(1), batch_size=0, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        EpisodeSampler(make_tasks(1), batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="at least one task"):
        EpisodeSampler([], batch_size=1, seed=0)


def test_collate_pads_with_ignore_and_resizes_nothing():
    small, wide = np.array([[1]], np.uint8), np.array([[2, 3, 4], [5, 6, 7]], np.uint8)
    batch = collate([Episode("a", (), small, wide, 0), Episode("b", (), wide, None, 0)])
    x = IGNORE
    assert batch.query.dtype == batch.target.dtype == torch.int64
    assert batch.query.tolist() == [[[1, x, x], [x, x, x]], [[2, 3, 4], [5, 6, 7]]]
    assert batch.target.tolist() == [[[2, 3, 4], [5, 6, 7]], [[x, x, x], [x, x, x]]]
    assert batch.query_size.tolist() == [[1, 1], [2, 3]] and batch.target_size.tolist() == [[2, 3], [0, 0]]
    assert [episode.task_id for episode in batch.episodes] == ["a", "b"]


def test_collate_canvas():
    episode = Episode("a", (), np.ones((2, 3), np.uint8), np.ones((4, 1), np.uint8), 0)
    assert collate([episode]).query.shape == (1, 4, 3)
    assert collate([episode], canvas=(30, 30)).target.shape == (1, 30, 30)
    with pytest.raises(ValueError, match=r"canvas must hold every grid \(4x3\), got 3x30"):
        collate([episode], canvas=(3, 30))
    with pytest.raises(ValueError, match="at least one episode"):
        collate([])


def test_batch_to_moves_every_tensor():
    batch = collate(EpisodeSampler(make_tasks(3), batch_size=4, seed=0).batch(0, 0)).to("meta")
    for name in ("query", "target", "query_size", "target_size"):
        assert getattr(batch, name).device.type == "meta"
    assert len(batch.episodes) == 4
