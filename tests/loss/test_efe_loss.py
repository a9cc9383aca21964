"""The fused backends of the EFE loss against the specification in float64: values, gradients and edge rules.

Strides and random cases are test_efe_layouts.py's.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efe_cases import ALL_TERMS, DIFFERENTIABLE, TERM_SETS, assert_agrees, check, make_case, run, with_grad

from qwen_fused import backends
from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.dispatch import COMPILED, TRITON_CLASSES
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1, 1), (2, 3, 5, 4, 3), (1, 12, 2, 3, 5), (2, 1, 10, 9, 11), (1, 2, 64, 2, 3)]
)
def test_matches_reference(fused, shape, dtype):
    if fused["device"] == "cuda" and shape[2] > TRITON_CLASSES:
        pytest.skip("Triton compiles that for minutes")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [3e6, 4e8, -1e9, 3e12, -1e30])
def test_logits_all_at_one_level(fused, level, dtype):
    """What every class of a cell shares drops out, however large; -1e9 is how others mask."""
    case = make_case(H=5, W=9, dtype=dtype)
    spread = dict.fromkeys(("plan_logits", "back_logits", "preference_logits"))
    for name in spread:
        # in steps that a float32 of this size can tell apart, and of which half of the cells have none
        case[name][..., :4] = 0
        case[name] = (level + (abs(level) * 2.0**-20) * case[name].round()).to(dtype)
    check(case, fused, weights=EFEWeights(agreement=0.5, anchor=0.3, prompt=0.0))


def test_norms_under_eps(fused):
    """A pooled plan, then a prompt, too short for the cosine: as in F.cosine_similarity the norm is held at 1e-8."""
    case = make_case()
    case["plan_logits"] = 1e-11 * case["plan_logits"]
    check(case, fused, weights=TERM_SETS["prompt"])
    case = make_case()
    case["prompt_colors"] = 1e-11 * case["prompt_colors"]
    check(case, fused, weights=TERM_SETS["prompt"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_target_dtypes(fused, dtype):
    case = make_case()
    ignore_index = 255 if dtype == torch.uint8 else -100
    case["target"] = case["target"].masked_fill(case["target"] == -100, ignore_index).to(dtype)
    check(case, fused, weights=ALL_TERMS, ignore_index=ignore_index)


def test_ignored_cells_change_nothing(fused):
    case = make_case(dtype=torch.float32)
    ignored = case["target"] == -100
    clean, _ = run(with_grad(case, fused["device"]), backend=fused["backend"], weights=ALL_TERMS)
    for poison in (torch.nan, torch.inf):
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


@pytest.mark.parametrize("upstream", [1.0, -2.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_risk(fused, dtype, upstream):
    """One cell beyond the first vector: its gradient is infinite, or no number, where the reference's is."""
    case = make_case(H=5, W=9, ignored=0.0, dtype=dtype)
    case["preference_logits"][0, 1, 2, 3] = -torch.inf
    out, grads = run(with_grad(case, fused["device"]), upstream, backend=fused["backend"], weights=ALL_TERMS)
    assert out.terms["risk"][0] == torch.inf and out.terms["risk"][1].isfinite()
    _, expected = run(with_grad(case), upstream, backend="reference", weights=ALL_TERMS)
    assert expected["plan_logits"][0, :, :, 2, 3].isfinite().sum() == 0
    for name, grad in grads.items():
        torch.testing.assert_close(grad.cpu(), expected[name], rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)


def test_a_preference_that_is_no_number_is_no_infinite_risk(fused):
    case = {name: x.to(fused["device"]) for name, x in make_case(ignored=0.0, dtype=torch.float32).items()}
    case["preference_logits"][0, 1], case["preference_logits"][0, 2] = -torch.inf, torch.nan
    assert efe_loss(**case, backend=fused["backend"], weights=TERM_SETS["risk"]).terms["risk"][0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preference_and_anchor_forbid_alike(fused, dtype):
    case = make_case(H=5, W=9, dtype=dtype)
    case["preference_logits"][:, 1] = case["anchor_log_probs"][1] = -torch.inf
    check(case, fused, weights=TERM_SETS["anchor"])


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
    """Two episodes, or one in random directions where Triton is interpreted, which takes its time."""
    slow = fused["backend"] == "triton" and fused["device"] == "cpu"
    case = with_grad(make_case(B=1 if slow else 2, T=2, C=3, H=1, W=2, seed=3), fused["device"])
    assert (case["target"] != -100).any()

    def loss(*leaves):
        inputs = dict(zip(DIFFERENTIABLE, leaves, strict=True))
        return efe_loss(
            **{**case, **inputs}, weights=ALL_TERMS, hard_mode=hard_mode, hard_floor=0.3, backend=fused["backend"]
        ).loss

    assert torch.autograd.gradcheck(loss, [case[name] for name in DIFFERENTIABLE], fast_mode=slow)


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
