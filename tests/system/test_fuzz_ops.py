"""Arguments of the public ops, right and wrong, by the hundred: a ValueError that names one, or a right result."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_fused as qf

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHAPE = st.tuples(*[st.integers(0, 3)] * 5) | st.lists(st.integers(0, 3), max_size=6).map(tuple)
NAMES = {
    "target", "plan_logits", "back_logits", "preference_logits", "anchor_log_probs", "obs_entropy", "prompt_colors",
    "step_weight", "class_weight", "hard_floor", "hard_mode", "ignore_index", "backend", "weights", "logits",
}  # fmt: skip


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    return (torch.arange(count) % 3).view(shape).to(dtype)


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_efe_loss_takes_what_fits_and_names_what_does_not(data):
    draw = data.draw
    B, T, C, H, W = (draw(st.integers(1, 3)) for _ in range(5))
    fits = {
        "plan_logits": (B, T, C, H, W), "target": (B, H, W), "back_logits": (B, T, C, H, W),
        "preference_logits": (B, C, H, W), "anchor_log_probs": (C, H, W), "obs_entropy": (C,),
        "prompt_colors": (B, C), "step_weight": (T,), "class_weight": (C,),
    }  # fmt: skip
    given_names = ["plan_logits", "target", *draw(st.sets(st.sampled_from(sorted(fits)[2:])))]
    spoilt = draw(st.none() | st.sampled_from(sorted(set(given_names))))
    arguments, wrong = {}, False
    for name in dict.fromkeys(given_names):
        shape, dtype = fits[name], torch.int64 if name == "target" else torch.float32
        if name == spoilt:
            shape, dtype = draw(SHAPE | st.just(shape)), draw(st.sampled_from(DTYPES))
        arguments[name] = tensor(shape, dtype)
        fine = dtype in INTEGERS if name == "target" else dtype.is_floating_point
        # a plan of another shape makes every other argument wrong
        wrong |= shape != fits[name] or not fine
    if arguments["target"].dtype in INTEGERS:
        arguments["target"] = arguments["target"].clamp(max=C - 1)
    modes, backends = ["episode", "cell", "none"], ["auto", "reference"]
    options = {
        "hard_floor": (draw(st.sampled_from([0.5, 0.0, 1.0, -0.1, 1.1, math.nan])), lambda x: 0 <= x <= 1),
        "hard_mode": (draw(st.sampled_from([*modes, "all", ""])), modes.__contains__),
        "backend": (draw(st.sampled_from([*backends, "fast"])), backends.__contains__),
    }
    wrong |= any(not rule(value) for value, rule in options.values())
    try:
        out = qf.efe_loss(**arguments, **{name: value for name, (value, _) in options.items()})
    except ValueError as error:
        assert wrong, (error, arguments, options)
        assert str(error).split()[0].split("=")[0] in NAMES, error
        return
    if wrong:
        # another plan may still fit everything else: then its own shape is what counts
        assert spoilt == "plan_logits" and arguments["plan_logits"].is_floating_point()
        assert all(rule(value) for value, rule in options.values())
    assert out.loss.dim() == 0 and out.accuracy.shape == (arguments["plan_logits"].shape[0],)


@settings(deadline=None, max_examples=100)
@given(SHAPE, SHAPE, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(-3, 12))
def test_hard_cell_cross_entropy(logits, target, kind, other, value):
    x, y = tensor(logits, kind), torch.full(target, value).to(other)
    try:
        loss = qf.hard_cell_cross_entropy(x, y)
    except ValueError as error:
        assert str(error).split()[0] in NAMES, error
        return
    assert kind.is_floating_point and other in INTEGERS and len(logits) in (2, 4)
    assert target == (logits[:1] if len(logits) == 2 else (logits[0], *logits[2:]))
    assert y.numel() == 0 or 0 <= value < logits[1] or value == -100
    assert loss.dim() == 0


THING = st.sampled_from([None, 1, "qwen", [], {}, torch.zeros(2), [torch.zeros(2)], [1], [[torch.zeros(1)]], object()])
PARAMETERS = st.sampled_from([0, 1, 2]).map(lambda n: [torch.nn.Parameter(torch.ones(3)) for _ in range(n)])


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(st.sampled_from(["a", "b", ""]), PARAMETERS | THING, max_size=2), THING | st.floats())
def test_group_grad_norm_and_clip(groups, limit):
    try:
        norms = qf.GroupGradNorm(groups)
        stats = norms.measure()
        norms.clip_(stats, limit)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(limit, (int, float, dict)), limit
    assert set(stats.to_dict()) == set(groups)


@pytest.mark.parametrize("size", [0, -1, 1.5, "3", None, True])
def test_window_of_no_size(size):
    with pytest.raises(ValueError, match="size must be"):
        qf.PromptWindow(lambda keys: torch.zeros(len(keys), 2, requires_grad=True), size=size)


@pytest.mark.parametrize(
    "change",
    [{"loss_fn": lambda: torch.ones(2)}, {"params": 3}, {"params": {}}, {"params": {"w": 1}},
     {"optimizer": "adam"}, {"directions": 0}, {"directions": 1.5}, {"loss_fn": None}],
)  # fmt: skip
def test_prove_says_what_it_was_given(change):
    weight = torch.nn.Parameter(torch.ones(2))
    arguments = {"loss_fn": lambda: (weight**2).sum(), "params": {"w": weight}, **change}
    with pytest.raises(ValueError, match=r"\w"):
        qf.prove(**arguments)
