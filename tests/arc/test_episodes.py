"""Held-out tasks stay out, every pair asks once per epoch, batches repeat exactly, and no grid is resized."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tasks import make_tasks

from qwen_fused.arc.episodes import IGNORE, Episode, Pair, augment, collate, leave_one_out, test_episodes


def test_without_answer_keeps_the_question():
    (task,) = make_tasks(1)
    for episode in leave_one_out(task) + test_episodes([task]):
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
    (after,) = augment((episode,), rng)
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
        (after,) = augment((episode,), np.random.default_rng(seed))
        assert after.answer is None
        shapes.add((after.query > 0).astype(int).tobytes() + bytes(after.query.shape))
        colors.add(int(after.query.max()))
    assert len(shapes) == 8 and colors == set(range(1, 10))
    assert grid.tolist() == [[0, 0, 0], [0, 0, 1]]


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
    batch = collate([e for task in make_tasks(2) for e in leave_one_out(task)]).to("meta")
    for name in ("query", "target", "query_size", "target_size"):
        assert getattr(batch, name).device.type == "meta"
    assert len(batch.episodes) == 7
