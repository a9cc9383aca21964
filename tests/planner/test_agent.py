"""The planner: views point where they say, padding never matters, every step and both directions carry a gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_fused.arc.episodes import IGNORE
from qwen_fused.planner.agent import VIEWS, GridAgent, SizeHead, one_hot_views, view_indices

D = 16


def on_canvas(grid: np.ndarray, side: int) -> torch.Tensor:
    canvas = torch.full((1, side, side), IGNORE)
    canvas[0, : grid.shape[0], : grid.shape[1]] = torch.from_numpy(grid)
    return canvas


def seen_through(view: str, grid: np.ndarray, size: tuple[int, int], side: int = 9) -> np.ndarray:
    """What a view shows of a grid at a destination size, -1 where it shows nothing."""
    indices = view_indices(torch.tensor([grid.shape]), torch.tensor([size]), side, side)
    copies = one_hot_views(on_canvas(grid, side), indices)[0, VIEWS.index(view)].view(10, side, side)
    color = torch.where(copies.sum(0) > 0, copies.argmax(0), -1)
    return color[: size[0], : size[1]].numpy()


@pytest.fixture
def agent() -> GridAgent:
    return GridAgent(channels=12, prompt_dim=D, steps=3)


def example(batch: int = 2, height: int = 5, width: int = 4):
    query = torch.randint(0, 10, (batch, height, width))
    size = torch.tensor([[height, width]] * batch)
    return torch.randn(batch, D, requires_grad=True), query, size


def test_views_are_the_transformations_they_name():
    grid = np.random.default_rng(0).integers(0, 10, (2, 3))
    expected = {
        "identity": grid,
        "flip_columns": grid[:, ::-1],
        "flip_rows": grid[::-1],
        "rotate_180": np.rot90(grid, 2),
        "transpose": grid.T,
        "rotate_90": np.rot90(grid, 3),
        "rotate_270": np.rot90(grid, 1),
        "anti_transpose": np.rot90(grid, 2).T,
        "rescale": np.kron(grid, np.ones((3, 2), int)),
        "tile": np.tile(grid, (3, 2)),
        "tile_mirrored": np.block([[grid, grid[:, ::-1]], [grid[::-1], grid[::-1, ::-1]]]),
        "bottom_right": grid[-1:, -2:],
    }
    assert tuple(expected) == VIEWS
    for view, answer in expected.items():
        np.testing.assert_array_equal(seen_through(view, grid, answer.shape), answer, err_msg=view)


def test_views_show_nothing_beyond_the_source():
    grid = np.ones((2, 2), int)
    np.testing.assert_array_equal(seen_through("identity", grid, (3, 3))[2], [-1, -1, -1])


def test_shapes(agent):
    prompt, query, size = example()
    plan = agent(prompt, query, size, size, target=query)
    assert plan.logits.shape == plan.back_logits.shape == (2, 3, 10, 5, 4)
    assert plan.back_input.shape == (2, 10, 5, 4) and plan.state.shape == (2, 12)
    alone = agent(prompt, query, size, size, readouts=1)
    assert alone.back_logits is None and alone.back_input is None
    torch.testing.assert_close(alone.logits[:, 0], plan.logits[:, -1])


def test_padding_changes_nothing(agent):
    prompt, query, size = example()
    wide = torch.full((2, 9, 11), IGNORE)
    wide[:, :5, :4] = query
    small = agent(prompt, query, size, size, target=query)
    large = agent(prompt, wide, size, size, target=wide)
    for a, b in ((small.logits, large.logits), (small.back_logits, large.back_logits)):
        torch.testing.assert_close(a, b[..., :5, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.state, large.state, rtol=1e-4, atol=1e-5)


def test_every_step_has_its_own_logits_and_its_own_gradient(agent):
    prompt, query, size = example()
    logits = agent(prompt, query, size, size).logits
    for step in range(1, agent.steps):
        assert not torch.allclose(logits[:, step], logits[:, step - 1])
    for step in range(agent.steps):
        (grad,) = torch.autograd.grad(logits[:, step].square().sum(), prompt, retain_graph=True)
        assert grad.abs().sum() > 0


def test_backward_plan_comes_from_the_target_and_is_not_the_forward_plan_reversed(agent):
    prompt, query, size = example()
    target = (query + 1) % 10
    plan = agent(prompt, query, size, size, target=target)
    other = agent(prompt, query, size, size, target=(query + 2) % 10)
    torch.testing.assert_close(plan.logits, other.logits)
    assert not torch.allclose(plan.back_logits, other.back_logits)
    assert not torch.allclose(plan.back_logits, plan.logits.flip(1))


def test_forward_plan_never_sees_the_target(agent):
    prompt, query, size = example()
    with_target = agent(prompt, query, size, size, target=(query + 1) % 10).logits
    torch.testing.assert_close(with_target, agent(prompt, query, size, size).logits)


def test_far_cells_reach_each_other(agent):
    # 3 steps of 3x3 see 3 cells far; context over rows, columns and the whole must carry the rest
    prompt, query, size = example(batch=1, height=20, width=20)
    changed = query.clone()
    changed[0, 19, 19] = (changed[0, 19, 19] + 1) % 10
    a, b = (agent(prompt, q, size, size).logits[0, -1, :, 0, 0] for q in (query, changed))
    assert not torch.equal(a, b)


def test_every_parameter_gets_a_gradient(agent):
    prompt, query, size = example()
    plan = agent(prompt, query, size, size, target=(query + 3) % 10)
    size_logits = agent.size_head(prompt, size, torch.tensor([[5.0, 4.0, 5.0, 4.0]] * 2))
    loss = plan.logits.square().mean() + plan.back_logits.square().mean() + plan.back_input.square().mean()
    (loss + size_logits.square().mean()).backward()
    assert [name for name, p in agent.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_size_head_points_at_the_demonstrations_sizes():
    head = SizeHead(D)
    torch.nn.init.zeros_(head.free.weight)
    prompt, own = torch.randn(1, D), torch.tensor([[6, 4]])
    demos = torch.tensor([[3.0, 2.0, 9.0, 6.0]])
    logits = head(prompt, own, demos) - head.free.bias.view(1, 2, 30)
    rows, columns = (set((side.nonzero().flatten() + 1).tolist()) for side in logits[0])
    # own side, the other side, the demonstrations' output, three times the query
    assert rows == {6, 4, 9, 18} and columns == {4, 6, 12}
