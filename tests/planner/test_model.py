"""The whole path: every parameter is reached and belongs to one group, and no answer ever reaches a prediction."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from qwen_fused.arc.episodes import collate, load_tasks, test_episodes
from qwen_fused.arc.sampler import EpisodeSampler
from qwen_fused.loss.efe_loss import EFEWeights
from qwen_fused.planner.model import QwenPlanner, further_attempts


@pytest.fixture
def tasks(small_arc):
    return load_tasks(str(small_arc)).tasks


@pytest.fixture
def model(small_config) -> QwenPlanner:
    return QwenPlanner(small_config())


@pytest.fixture
def batch(tasks):
    return collate(EpisodeSampler(tasks, batch_size=4, seed=0).batch(0, 0))


def graph_leaves(loss: torch.Tensor) -> set[int]:
    """Ids of every leaf that the autograd graph of a loss accumulates into."""
    seen, leaves, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack += [n for n, _ in node.next_functions]
    return leaves


def test_graph_reaches_exactly_the_models_parameters_at_every_forward(model, batch):
    # a layer created inside forward would be a leaf of the graph that the model does not own
    own = {id(p) for p in model.parameters() if p.requires_grad}
    assert graph_leaves(model(batch, epoch=0).loss) == own
    assert graph_leaves(model(batch, epoch=1).loss) == own


def test_every_parameter_gets_a_gradient_and_one_group(model, batch):
    model(batch, epoch=0).loss.backward()
    named = dict(model.named_parameters())
    dead = [name for name, p in named.items() if p.grad is None or p.grad.abs().sum() == 0]
    assert dead == []
    grouped = [name for members in model.groups().values() for name, _ in members]
    assert sorted(grouped) == sorted(named) and set(model.groups()) == {"qwen", "agent", "policy", "objective"}
    assert all(name.startswith("prompt.backbone.") for name, _ in model.groups()["qwen"])


def test_a_step_moves_every_layer_of_qwen(model, batch):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(batch, epoch=0).loss.backward()
    optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


def test_gradient_to_qwen_comes_through_the_plan_too(model, batch):
    # the policy's own loss must not be the only way: the objective alone reaches the first layer
    score = model(batch, epoch=0).score.loss
    weight = next(p for n, p in model.groups()["qwen"] if "layers.0" in n and p.ndim == 2)
    assert torch.autograd.grad(score, weight)[0].abs().sum() > 0


def test_reward_is_the_change_in_accuracy_per_episode(model, batch):
    with torch.no_grad():
        model.policy.gate.bias.fill_(-1e4)
    out = model(batch, epoch=0)
    # with the gate shut the refined prompt is the prompt, and there is nothing to reward
    assert out.reward.shape == (4,) and torch.equal(out.reward, torch.zeros(4))
    assert not out.reward.requires_grad


def test_one_backbone_in_memory(small_config):
    gc.collect()
    before = sum(issubclass(type(o), PreTrainedModel) for o in gc.get_objects())
    model = QwenPlanner(small_config())
    inside = sum(isinstance(m, PreTrainedModel) for m in model.modules())
    gc.collect()
    assert sum(issubclass(type(o), PreTrainedModel) for o in gc.get_objects()) - before == inside == 1


def test_answers_change_no_prediction(model, tasks):
    episodes = test_episodes(tasks)[:4]
    wrong = [replace(e, answer=(e.answer[::-1].repeat(2, 0) + 1) % 10) for e in episodes]
    predicted = (model.predict(some) for some in (episodes, wrong, [e.without_answer() for e in episodes]))
    for first, second, third in zip(*predicted, strict=True):
        for a, b, c in zip(first, second, third, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


def test_demonstrations_change_predictions(model, tasks):
    episodes = test_episodes(tasks)[:4]
    others = episodes[1:] + episodes[:1]
    shuffled = [replace(e, demonstrations=o.demonstrations) for e, o in zip(episodes, others, strict=True)]
    a, b = model.refined_prompt(episodes)[0], model.refined_prompt(shuffled)[0]
    assert (a - b).abs().amax(1).min() > 1e-3


def test_predict_is_repeatable_and_leaves_everything_as_it_was(model, tasks):
    model.train()
    model.agent.eval()
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    episodes = test_episodes(tasks)[:3]
    first, second = model.predict(episodes), model.predict(episodes)
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_predict_gives_two_different_grids_of_the_predicted_size(model, tasks):
    # the head is made to say 2 x 5, whatever the answers' sizes
    head = model.agent.size_head
    with torch.no_grad():
        head.gate.weight.zero_()
        head.gate.bias.zero_()
        head.free.weight.zero_()
        head.free.bias.zero_().view(2, 30)[[0, 1], [1, 4]] = 20.0
    for grids in model.predict(test_episodes(tasks)[:4]):
        assert [g.shape for g in grids] == [(2, 5), (2, 5)] and grids[0].dtype == np.uint8
        assert not np.array_equal(*grids)


@torch.no_grad()
def test_vote_turns_with_the_episode(model, tasks):
    # a vote over all eight symmetries does not depend on how the episode lies
    from qwen_fused.arc.symmetry import swaps_sides, turn

    episodes = test_episodes(tasks)[:3]
    upright = model.voted_probabilities(episodes, [(2, 4)] * 3)
    for symmetry in (1, 6):
        sizes = [(4, 2) if swaps_sides(symmetry) else (2, 4)] * 3
        turned = model.voted_probabilities([e.turn(symmetry) for e in episodes], sizes)
        for a, b in zip(upright, turned, strict=True):
            np.testing.assert_allclose(turn(a, symmetry), b, atol=1e-5)
    alone = model.cell_probabilities(episodes, model.refined_prompt(episodes), [(2, 4)] * 3)
    assert not np.allclose(alone[0], upright[0], atol=1e-4)


def test_plan_steps_end_in_the_upright_prediction(model, tasks):
    episode = test_episodes(tasks)[0]
    steps = model.plan_steps(episode)
    assert len(steps) == 3
    np.testing.assert_array_equal(steps[-1], model.predict([episode], attempts=1)[0][0])


def test_further_attempts_change_the_least_certain_cells():
    probabilities = np.array([[[0.9, 0.5, 0.8]], [[0.1, 0.45, 0.2]], [[0.0, 0.05, 0.0]]])
    same = np.zeros((1, 3), np.uint8)
    second, third = further_attempts(probabilities, same, 2)
    np.testing.assert_array_equal(second, [[0, 1, 0]])
    np.testing.assert_array_equal(third, [[0, 0, 1]])
    other = np.ones((2, 2), np.uint8)
    assert further_attempts(probabilities, other, 1)[0] is other


@pytest.mark.parametrize(
    "terms", [{}, {"risk": 0.0, "anchor": 0.0}, {"ambiguity": 0.5}, {"prompt": 0.0, "agreement": 0.0}]
)
def test_any_choice_of_terms_leaves_no_dead_parameter(small_config, batch, terms):
    model = QwenPlanner(small_config(weights=replace(EFEWeights(), **terms)))
    model(batch, epoch=0).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []
