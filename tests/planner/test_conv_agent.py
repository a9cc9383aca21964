"""The agent of runs before 0.3: padding never matters, every step and both directions carry a gradient; its bits."""

from __future__ import annotations

import pytest
import torch

from qwen_fused.arc.episodes import IGNORE
from qwen_fused.config import TrainConfig
from qwen_fused.planner.agent import GridAgent
from qwen_fused.planner.conv_agent import ConvAgent, ConvCore
from qwen_fused.planner.make_agent import make_agent

D = 16


@pytest.fixture
def agent() -> ConvAgent:
    return ConvAgent(channels=12, prompt_dim=D, steps=3)


def example(batch: int = 2, height: int = 5, width: int = 4):
    query = torch.randint(0, 10, (batch, height, width))
    size = torch.tensor([[height, width]] * batch)
    return torch.randn(batch, D, requires_grad=True), query, size


def test_configuration_chooses_the_agent():
    kinds = [type(make_agent(TrainConfig(agent=name))) for name in ("lines", "conv")]
    assert kinds == [GridAgent, ConvAgent] and TrainConfig().agent == "lines"


def test_shapes(agent):
    prompt, query, size = example()
    plan = agent(prompt, query, size, size, target=query)
    assert plan.logits.shape == plan.back_logits.shape == (2, 3, 10, 5, 4)
    assert plan.back_input.shape == (2, 10, 5, 4) and plan.state.shape == (2, 12)
    alone = agent(prompt, query, size, size, readouts=1)
    assert alone.back_logits is None and alone.back_input is None
    torch.testing.assert_close(alone.logits[:, 0], plan.logits[:, -1])


def test_weights_have_the_names_and_shapes_of_the_runs(agent):
    shapes = {name: tuple(tensor.shape) for name, tensor in agent.state_dict().items() if "size_head" not in name}
    assert shapes == {
        "direction": (2, 12),
        "copy_scale": (),
        "encode.weight": (12, 126, 1, 1),
        "encode.bias": (12,),
        "core.norm.weight": (12, 1, 1),
        "core.local.weight": (24, 12, 3, 3),
        "core.local.bias": (24,),
        "core.context.weight": (24, 24),
        "core.context.bias": (24,),
        "core.film.weight": (48, D),
        "core.film.bias": (48,),
        "core.update.weight": (12, 24, 1, 1),
        "core.update.bias": (12,),
        "readout_norm.weight": (12, 1, 1),
        "readout.weight": (22, 12, 1, 1),
        "readout.bias": (22,),
        "view_preference.weight": (12, D),
        "view_preference.bias": (12,),
    }


def test_the_encoder_sees_rows_after_rows_whatever_the_canvas(agent):
    # a convolution of other strides has other last bits, and no run would resume bitwise
    seen = []
    agent.encode.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].stride()))
    for side in (1, 3):
        prompt, query, size = example(4, side, side)
        agent(prompt, query, size, size)
    assert seen == [(126, 1, 1, 1), (126 * 9, 9, 3, 1)]


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


def test_gradcheck_of_a_step():
    core = ConvCore(4, D).double()
    prompt = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    alive = torch.ones(2, 1, 3, 2, dtype=torch.float64)
    alive[1, :, 2] = 0
    assert torch.autograd.gradcheck(lambda s, p: core(s * alive, alive, *core.condition(p)), (state, prompt))
