"""Every pair asks once per pass, batches repeat exactly, sizes share batches, and a window's prompts are shared."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from random_tasks import make_tasks

from qwen_fused.arc.episodes import Episode, Pair, Task, collate, load_tasks
from qwen_fused.arc.sampler import EpisodeSampler


def same_episodes(left: list[Episode], right: list[Episode]) -> bool:
    def content(episode: Episode) -> tuple:
        grids = [grid for pair in episode.demonstrations for grid in (pair.input, pair.output)]
        grids += [episode.query, episode.answer]
        return (episode.task_id, episode.index, [grid.tolist() for grid in grids])

    return [content(episode) for episode in left] == [content(episode) for episode in right]


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
    sampler = EpisodeSampler(load_tasks("arc1").tasks, batch_size=16, seed=0)
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
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        EpisodeSampler(make_tasks(1), batch_size=1, seed=0, window=0)
    with pytest.raises(ValueError, match="at least one task"):
        EpisodeSampler([], batch_size=1, seed=0)


@pytest.mark.parametrize(("window", "visits", "batch_size"), [(10, 4, 16), (4, 4, 8), (3, 2, 4), (5, 1, 4), (7, 20, 4)])
def test_a_window_visits_each_prompt_of_its_pool_in_turn(window, visits, batch_size):
    tasks = make_tasks(40)
    sampler = EpisodeSampler(tasks, batch_size=batch_size, seed=1, window=window, visits=visits)
    count = sampler.batches_per_epoch()
    for first in range(0, count, window):
        batches = [sampler.batch(0, index) for index in range(first, min(first + window, count))]
        assert [sampler.window_start(index) for index in range(first, first + len(batches))] == [first] * len(batches)
        ends = [sampler.ends_window(index) for index in range(first, first + len(batches))]
        assert ends == [False] * (len(batches) - 1) + [True]
        pool = min(-(-window // min(visits, window)), len(batches))
        # a prompt window counts prompts as it keys them: by the demonstrations themselves
        prompts = Counter(episode.demonstrations for batch in batches for episode in batch)
        assert len(prompts) <= pool * batch_size
        assert set(prompts.values()) <= {len(batches) // pool, -(-len(batches) // pool)}
        for batch in batches:
            assert len({episode.demonstrations for episode in batch}) == len(batch)


def test_a_pool_sweeps_all_pairs_before_any_comes_again():
    tasks = make_tasks(30)
    sampler = EpisodeSampler(tasks, batch_size=4, seed=2, window=4, visits=4)
    pairs, count = sum(len(task.train) for task in tasks), sampler.batches_per_epoch()
    windows = [(epoch, first) for epoch in range(4) for first in range(0, count, 4)]
    asked: Counter[tuple[str, int]] = Counter()
    for epoch, first in windows:
        if sum(asked.values()) + 4 <= pairs:
            asked.update((episode.task_id, episode.index) for episode in sampler.batch(epoch, first))
    assert set(asked.values()) == {1} and sum(asked.values()) > pairs - 4


def test_two_pairs_ask_in_turns_where_two_still_demonstrate():
    tasks = [task for task in make_tasks(60) if len(task.train) in (3, 5)]
    sampler = EpisodeSampler(tasks, batch_size=4, seed=0, augment=1.0, window=4, visits=4)
    by_id = {task.id: task for task in tasks}
    for first in range(0, sampler.batches_per_epoch() - 4, 4):
        for visits in zip(*(sampler.batch(0, index) for index in range(first, first + 4)), strict=True):
            train = len(by_id[visits[0].task_id].train)
            queries = {visit.index for visit in visits}
            assert len(queries) == (2 if train >= 4 else 1)
            assert all(visit.demonstrations is visits[0].demonstrations for visit in visits)
            assert len(visits[0].demonstrations) == train - len(queries)
            # turned and recoloured alike, and none of the queries is among what demonstrates
            shown = {pair.input.tobytes() for pair in visits[0].demonstrations}
            assert not shown & {visit.query.tobytes() for visit in visits}


def test_windows_repeat_exactly_whenever_they_are_asked_for():
    def make(window: int = 5) -> EpisodeSampler:
        return EpisodeSampler(make_tasks(25), batch_size=4, seed=5, window=window, visits=2)

    straight, other = make(), make()
    places = [(epoch, index) for epoch in (0, 1, 2) for index in range(straight.batches_per_epoch())]
    forwards = [straight.batch(*place) for place in places]
    backwards = [other.batch(*place) for place in reversed(places)][::-1]
    assert all(same_episodes(a, b) for a, b in zip(forwards, backwards, strict=True))
