"""The fused backends of the EFE loss against the specification in float64: values, gradients and edge rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efe_cases import ALL_TERMS, DIFFERENTIABLE, FUSED, assert_agrees, in_float64, make_case, run, with_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_fused import backends
from qwen_fused.ops import COMPILED, EFEWeights, efe_loss, hard_cell_cross_entropy

ZERO = dict(ce=0.0, risk=0.0, ambiguity=0.0, agreement=0.0, anchor=0.0, prompt=0.0)
TERM_SETS = {name: EFEWeights(**{**ZERO, name: 1.3}) for name in ZERO}
TERM_SETS |= {"all": ALL_TERMS, "default": EFEWeights()}


@pytest.fixture(params=FUSED)
def fused(request) -> dict:
    """Options that select the backend under test; every output it allocates starts as NaN."""
    backend, device = request.param
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield {"backend": backend, "device": device}
    torch.use_deterministic_algorithms(False)


def check(case: dict, fused: dict, upstream: float = 1.0, **options) -> None:
    """Loss, reports and every gradient of a backend against the specification on the same numbers in float64."""
    expected, expected_grads = run(with_grad(in_float64(case)), upstream, backend="reference", **options)
    leaves = with_grad(case, fused["device"])
    out, grads = run(leaves, upstream, backend=fused["backend"], **options)
    dtype = case["plan_logits"].dtype
    value = torch.float64 if out.loss.dtype == torch.float64 else torch.float32
    assert_agrees(out.loss.detach(), expected.loss.detach(), value, "loss")
    assert out.terms.keys() == expected.terms.keys()
    for name, term in out.terms.items():
        # a divergence is what is left of logarithms of order 1: it can be no nearer than their rounding
        absolute = torch.finfo(value).eps if name in ("risk", "agreement", "anchor") else 1e-12
        assert_agrees(term, expected.terms[name], value, name, absolute)
        assert not term.requires_grad
    assert_agrees(out.hard_ratio, expected.hard_ratio, value, "hard_ratio")
    assert_agrees(out.accuracy, expected.accuracy, value, "accuracy")
    assert torch.equal(out.solved.cpu(), expected.solved)
    assert torch.equal(out.predicted.cpu(), expected.predicted)
    for name, grad in grads.items():
        if expected_grads[name] is None or grad is None:
            # a term that is off: no gradient, or exactly none
            assert grad is None or not grad.any(), name
            assert expected_grads[name] is None or not expected_grads[name].any(), name
            continue
        assert grad.dtype == leaves[name].dtype
        assert_agrees(grad, expected_grads[name], min(dtype, grad.dtype, key=lambda d: torch.finfo(d).bits), name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1, 1), (2, 3, 5, 4, 3), (1, 12, 2, 3, 5), (3, 1, 10, 9, 11), (1, 2, 64, 2, 3)]
)
def test_matches_reference(fused, shape, dtype):
    check(make_case(*shape, dtype=dtype), fused, weights=ALL_TERMS, hard_floor=0.3)


@pytest.mark.parametrize("hard_mode", ["episode", "cell", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_hard_modes(fused, hard_mode, weighted):
    check(make_case(weighted=weighted), fused, weights=ALL_TERMS, hard_mode=hard_mode, hard_floor=0.3)


@pytest.mark.parametrize("terms", TERM_SETS)
def test_terms(fused, terms):
    check(make_case(T=2), fused, weights=TERM_SETS[terms])


@pytest.mark.parametrize("left_out", [*DIFFERENTIABLE[1:], "anchor_log_probs", "class_weight", "step_weight"])
def test_inputs_left_out(fused, left_out):
    case = make_case(T=2)
    del case[left_out]
    check(case, fused, weights=ALL_TERMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(fused, dtype):
    check(make_case(H=5, W=5, dtype=dtype), fused, weights=ALL_TERMS)


def test_mixed_precision(fused):
    """As under autocast: narrow logits beside float32 parameters."""
    case = make_case(dtype=torch.float32)
    for name, dtype in (("plan_logits", torch.bfloat16), ("back_logits", torch.float16)):
        case[name] = case[name].to(dtype)
    check(case, fused, weights=ALL_TERMS)


def test_forbidden_classes(fused):
    check(make_case(forbidden=0.3), fused, weights=ALL_TERMS)


def test_large_logits(fused):
    case = make_case(dtype=torch.float32)
    for name in ("plan_logits", "back_logits"):
        case[name] = 1000 + 30 * case[name]
    check(case, fused, weights=ALL_TERMS)


def test_norms_under_eps(fused):
    """A pooled plan, then a prompt, too short for the cosine: as in F.cosine_similarity the norm is held at 1e-8."""
    case = make_case()
    case["plan_logits"] = 1e-11 * case["plan_logits"]
    check(case, fused, weights=TERM_SETS["prompt"])
    case = make_case()
    case["prompt_colors"] = 1e-11 * case["prompt_colors"]
    check(case, fused, weights=TERM_SETS["prompt"])


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
    check(case, fused, weights=ALL_TERMS)
    leaves = with_grad(case, fused["device"])
    _, grads = run(leaves, backend=fused["backend"], weights=ALL_TERMS)
    assert grads["plan_logits"].stride() == torch.empty_like(leaves["plan_logits"]).stride()


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_target_dtypes(fused, dtype):
    case = make_case()
    ignore_index = 255 if dtype == torch.uint8 else -100
    case["target"] = case["target"].masked_fill(case["target"] == -100, ignore_index).to(dtype)
    check(case, fused, weights=ALL_TERMS, ignore_index=ignore_index)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_ignored_cells_change_nothing(fused, poison):
    case = make_case(dtype=torch.float32)
    ignored = case["target"] == -100
    clean, _ = run(with_grad(case, fused["device"]), backend=fused["backend"], weights=ALL_TERMS)
    for name in ("plan_logits", "back_logits"):
        case[name] = case[name].masked_fill(ignored[:, None, None], poison)
    case["preference_logits"] = case["preference_logits"].masked_fill(ignored[:, None], poison)
    out, grads = run(with_grad(case, fused["device"]), backend=fused["backend"], weights=ALL_TERMS)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(out.predicted, clean.predicted)
    for name in ("plan_logits", "back_logits", "preference_logits"):
        there = grads[name].movedim(-3, -1).cpu()
        assert (there[ignored] if there.dim() == 4 else there.movedim(1, -1)[ignored]).eq(0).all(), name
        assert grads[name].isfinite().all(), name


@pytest.mark.parametrize("name", ["plan_logits", "back_logits", "preference_logits"])
def test_nan_in_a_valid_cell_is_not_hidden(fused, name):
    case = make_case(ignored=0.0, dtype=torch.float32)
    case[name][0, ..., 3, 1, 1] = torch.nan
    out, grads = run(with_grad(case, fused["device"]), backend=fused["backend"], weights=ALL_TERMS)
    assert out.loss.isnan()
    assert grads[name].isnan().any()


@pytest.mark.parametrize("label", range(5))
def test_nan_reaches_the_cross_entropy_of_every_class(fused, label):
    logits = torch.zeros(1, 5)
    logits[0, 2] = torch.nan
    target = torch.tensor([label])
    logits, target = logits.to(fused["device"]), target.to(fused["device"])
    assert hard_cell_cross_entropy(logits, target, backend=fused["backend"]).loss.isnan()


def test_infinite_risk(fused):
    case = make_case(ignored=0.0, dtype=torch.float32)
    case["preference_logits"][0, 1] = -torch.inf
    case = {name: x.to(fused["device"]) for name, x in case.items()}
    out = efe_loss(**case, backend=fused["backend"], weights=TERM_SETS["risk"])
    assert out.terms["risk"][0] == torch.inf and out.terms["risk"][1].isfinite()


def test_forbidden_target_counts_only_where_it_has_weight(fused):
    case = make_case(ignored=0.0, T=2)
    case["target"][:] = 2
    case["plan_logits"][:, 0, 2] = -torch.inf
    case["step_weight"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    check(case, fused, weights=TERM_SETS["ce"])
    case["step_weight"][0] = 1e-3
    moved = {name: x.to(fused["device"]) for name, x in case.items()}
    assert efe_loss(**moved, backend=fused["backend"], weights=TERM_SETS["ce"]).loss == torch.inf


def test_mean_is_over_episodes_with_cells(fused):
    case = make_case(B=3, T=2)
    case["target"][1] = -100
    for name in ("plan_logits", "back_logits", "preference_logits", "prompt_colors"):
        case[name][1] = torch.nan
    check(case, fused, weights=ALL_TERMS, upstream=2.5)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4), (2, 2, 3, 0, 4), (2, 2, 3, 2, 2)])
def test_nothing_valid(fused, shape):
    case = make_case(*shape, ignored=1.0)
    check(case, fused, weights=ALL_TERMS)


def test_tie_goes_to_the_lowest_class_and_only_a_tie(fused):
    # one step of float32 apart; after subtracting log sum exp they would be equal
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    logits = torch.stack([torch.stack([low, high, high]), torch.stack([low, low, low])]).to(fused["device"])
    target = torch.tensor([1, 2], device=fused["device"])
    out = hard_cell_cross_entropy(logits, target, backend=fused["backend"])
    assert out.predicted.tolist() == [1, 0]


def test_is_cross_entropy(fused):
    logits = torch.randn(50, 7, device=fused["device"], requires_grad=True)
    target = torch.randint(0, 7, (50,), device=fused["device"])
    target[::5] = -100
    weight = torch.rand(7, device=fused["device"])
    out = hard_cell_cross_entropy(logits, target, class_weight=weight, hard_mode="none", backend=fused["backend"])
    expected = F.cross_entropy(logits, target, weight=weight)
    torch.testing.assert_close(out.loss, expected)
    found, right = (torch.autograd.grad(loss, logits)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(found, right)


def test_divergences_are_kl_div(fused):
    case = with_grad(make_case(B=1, T=1, ignored=0.0, weighted=False), fused["device"])
    log_q, log_r = (case[name][0, 0].log_softmax(0) for name in ("plan_logits", "back_logits"))
    log_p = case["preference_logits"][0].log_softmax(0)
    log_m = ((log_q.exp() + log_r.exp()) / 2).log()
    cells = case["target"].numel()

    def kl(a, b):
        return F.kl_div(b, a, reduction="sum", log_target=True) / cells

    out = efe_loss(**case, backend=fused["backend"], weights=ALL_TERMS)
    torch.testing.assert_close(out.terms["risk"][0], kl(log_q, log_p))
    torch.testing.assert_close(out.terms["agreement"][0], 0.5 * kl(log_q, log_m) + 0.5 * kl(log_r, log_m))
    torch.testing.assert_close(out.terms["anchor"][0], kl(log_p, case["anchor_log_probs"]))


@pytest.mark.parametrize("hard_mode", ["episode", "cell"])
def test_gradcheck(fused, hard_mode):
    case = with_grad(make_case(B=2, T=2, C=3, H=1, W=2, seed=3), fused["device"])

    def loss(*leaves):
        inputs = dict(zip(DIFFERENTIABLE, leaves, strict=True))
        return efe_loss(
            **{**case, **inputs}, weights=ALL_TERMS, hard_mode=hard_mode, hard_floor=0.3, backend=fused["backend"]
        ).loss

    fast = fused["backend"] == "triton" and fused["device"] == "cpu"
    assert torch.autograd.gradcheck(loss, [case[name] for name in DIFFERENTIABLE], fast_mode=fast)


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_one_gradient_alone(fused, wanted):
    case = make_case(T=2)
    _, expected = run(with_grad(case), backend="reference", weights=ALL_TERMS)
    leaves = {name: x.detach().to(fused["device"]) for name, x in case.items()}
    leaves[wanted].requires_grad_()
    _, grads = run(leaves, backend=fused["backend"], weights=ALL_TERMS)
    assert_agrees(grads[wanted], expected[wanted], torch.float64, wanted)
    assert all(grad is None for name, grad in grads.items() if name != wanted)


def test_repeats_bit_for_bit(fused):
    case = make_case(B=3, T=2, H=7, W=9, dtype=torch.float32)
    runs = [run(with_grad(case, fused["device"]), backend=fused["backend"], weights=ALL_TERMS) for _ in range(2)]
    (out, grads), (again, grads_again) = runs
    assert torch.equal(out.loss, again.loss)
    for name in grads:
        assert torch.equal(grads[name], grads_again[name]), name


def test_inputs_are_not_modified(fused):
    case = {name: x.to(fused["device"]) for name, x in make_case(forbidden=0.2).items()}
    before = {name: x.clone() for name, x in case.items()}
    run(with_grad(case, fused["device"]), backend=fused["backend"], weights=ALL_TERMS)
    for name, x in case.items():
        assert torch.equal(x, before[name]), name


def test_offsets_beyond_32_bits(fused):
    """An episode 2^31 elements after another; only the pages in use exist."""
    small = make_case(B=2, T=1, C=2, H=2, W=2, dtype=torch.float16)
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=fused["device"])
    far = storage.as_strided((2, 1, 2, 2, 2), (2**31, 8, 4, 2, 1))
    far.copy_(small["plan_logits"])
    check({**small, "plan_logits": far}, fused, weights=ALL_TERMS)


@pytest.mark.skipif(not COMPILED, reason=f"no extension: {backends.EXTENSION_ERROR}")
def test_threads_change_no_bit():
    case = make_case(B=4, T=3, C=10, H=30, W=30, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(with_grad(case), backend="cpp", weights=ALL_TERMS))
    finally:
        torch.set_num_threads(threads)
    for out, grads in results[1:]:
        assert torch.equal(out.loss, results[0][0].loss)
        for name, grad in grads.items():
            assert torch.equal(grad, results[0][1][name]), name


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
