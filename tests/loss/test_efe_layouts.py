"""The fused backends of the EFE loss on tensors of any strides and shapes, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efe_cases import ALL_TERMS, check, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_fused import backends
from qwen_fused.loss.dispatch import COMPILED

pytestmark = pytest.mark.usefixtures("poisoned")


LAYOUTS = {
    "class last": lambda x: x.movedim(-3, -1).contiguous().movedim(-1, -3),
    "sliced canvas": lambda x: F.pad(x, (1, 2, 0, 1), value=9.0)[..., :-1, 1:-2],
    "width before height": lambda x: x.mT.contiguous().mT,
    "steps last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "reversed batch in a larger one": lambda x: torch.stack([x, x], 1)[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(fused, layout):
    """Any strides, each tensor its own; gradients come as empty_like would lay them out."""
    case = make_case()
    for name in ("plan_logits", "back_logits", "preference_logits", "anchor_log_probs"):
        case[name] = LAYOUTS[layout](case[name])
    case["target"] = F.pad(case["target"], (0, 3))[..., :-3]
    case["prompt_colors"] = case["prompt_colors"].t().contiguous().t()
    case["obs_entropy"] = case["obs_entropy"].repeat_interleave(2)[::2]
    grads = check(case, fused, weights=ALL_TERMS)
    assert grads["plan_logits"].stride() == torch.empty_like(case["plan_logits"]).stride()


@pytest.mark.parametrize("name", ["obs_entropy", "prompt_colors"])
def test_a_small_gradient_has_its_inputs_strides(fused, name):
    """As its fake tensor says: a compiled step asserts them."""
    case = make_case(B=3, T=2)
    case[name] = case[name].t().contiguous().t() if case[name].dim() > 1 else case[name].repeat_interleave(2)[::2]
    expected = torch.empty_like(case[name]).stride()
    assert check(case, fused, weights=ALL_TERMS)[name].stride() == expected


@pytest.mark.parametrize("classes", [20, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_class_last_with_more_classes_than_lanes(fused, classes, dtype):
    if fused["device"] == "cuda":
        pytest.skip("compiles for minutes")
    case = make_case(B=1, T=2, C=classes, H=5, W=5, dtype=dtype)
    for name in ("plan_logits", "back_logits", "preference_logits", "anchor_log_probs"):
        case[name] = LAYOUTS["class last"](case[name])
    check(case, fused, weights=ALL_TERMS)


@pytest.mark.parametrize("canvas", [(1, 7), (7, 1)])
def test_canvas_one_cell_wide(fused, canvas):
    check(make_case(H=canvas[0], W=canvas[1]), fused, weights=ALL_TERMS)


def test_expanded(fused):
    """One preference and one step for all: strides of 0, and the gradient summed by autograd's expand."""
    case = make_case()
    case["preference_logits"] = case["preference_logits"][:1].expand(2, -1, -1, -1)
    case["plan_logits"] = case["plan_logits"][:, :1].expand(-1, 3, -1, -1, -1)
    case["target"] = case["target"][:1].expand(2, -1, -1)
    check(case, fused, weights=ALL_TERMS)


def test_offsets_beyond_32_bits(fused, monkeypatch):
    """An episode 2^31 elements after another; only the pages in use exist."""
    small = make_case(B=2, T=1, C=2, H=2, W=2, dtype=torch.float16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=fused["device"])
    far = storage.as_strided((2, 1, 2, 2, 2), (2**31, 8, 4, 2, 1))
    far.copy_(small["plan_logits"])
    check({**small, "plan_logits": far}, fused, weights=ALL_TERMS)


@pytest.mark.skipif(not COMPILED, reason=f"no extension: {backends.EXTENSION_ERROR}")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 12), (2, 64), (1, 30), (1, 30)))).filter(
        lambda s: s[0] * s[1] * s[2] * s[3] * s[4] < 60_000
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    hard_mode=st.sampled_from(["episode", "cell", "none"]),
    layout=st.sampled_from([None, *LAYOUTS]),
    ignored=st.sampled_from([0.0, 0.3, 0.98]),
    forbidden=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 1000),
)
def test_random_cases(shape, dtype, hard_mode, layout, ignored, forbidden, seed):
    case = make_case(*shape, dtype=dtype, ignored=ignored, forbidden=forbidden, seed=seed)
    if layout is not None:
        case["plan_logits"] = LAYOUTS[layout](case["plan_logits"])
        case["preference_logits"] = LAYOUTS[layout](case["preference_logits"])
    check(case, {"backend": "cpp", "device": "cpu"}, weights=ALL_TERMS, hard_mode=hard_mode)
