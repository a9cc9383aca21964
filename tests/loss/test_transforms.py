"""The fused losses under forward-mode AD and torch.func: exact, or refused in a sentence that names the reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from efe_cases import ALL_TERMS, DIFFERENTIABLE, make_case, op_arguments, op_name, with_grad
from torch.autograd import forward_ad

from qwen_fused.loss.dispatch import COMPILED
from qwen_fused.loss.efe_loss import efe_loss

SECOND = "efe_loss has no second derivative in its fused backends: use backend='reference'"


@pytest.fixture
def loss(fused):
    """(backend or None for the fused one) -> function of the case's leaves, the leaves, and a direction for each."""
    case = {name: x.to(fused["device"]) for name, x in make_case(T=2, C=3, H=2, W=2, seed=4).items()}
    leaves = tuple(case[name] for name in DIFFERENTIABLE)
    g = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(x.shape, generator=g, dtype=x.dtype).to(x.device) for x in leaves)

    def of(backend: str | None = None, **options):
        def function(*leaves):
            given = dict(zip(DIFFERENTIABLE, leaves, strict=True))
            return efe_loss(
                **{**case, **given}, weights=ALL_TERMS, hard_floor=0.3, backend=backend or fused["backend"], **options
            ).loss

        return function

    return of, leaves, tangents


@pytest.mark.parametrize("hard_mode", ["episode", "cell"])
def test_jvp_is_exact(loss, hard_mode):
    of, leaves, tangents = loss
    value, tangent = torch.func.jvp(of(hard_mode=hard_mode), leaves, tangents)
    expected, right = torch.func.jvp(of("reference", hard_mode=hard_mode), leaves, tangents)
    torch.testing.assert_close((value, tangent), (expected, right), rtol=1e-10, atol=1e-12)
    assert right != 0


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("place", range(len(DIFFERENTIABLE)))
def test_dual_numbers(loss, place, requires_grad, grad_mode):
    """Whatever else autograd is told: each input by itself, with the others plain."""
    of, leaves, tangents = loss
    found = []
    for backend in (None, "reference"):
        inputs = [x.detach().clone().requires_grad_(requires_grad) for x in leaves]
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
            inputs[place] = forward_ad.make_dual(inputs[place], tangents[place])
            found.append(forward_ad.unpack_dual(of(backend)(*inputs)).tangent)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert found[1] != 0


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev, torch.func.grad])
def test_jacobians(loss, transform):
    of, leaves, _ = loss
    places = tuple(range(len(leaves)))
    found, expected = (transform(of(backend), argnums=places)(*leaves) for backend in (None, "reference"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_gradients_of_each_sample(fused):
    """vmap over episodes, of the loss and of its gradient, against one after another."""
    case = {name: x.to(fused["device"]) for name, x in make_case(B=3, T=2, C=3, H=2, W=2).items()}

    def sample(plan, target, back, backend):
        return efe_loss(plan[None], target[None], back_logits=back[None], backend=backend).loss

    arguments = [case[name] for name in ("plan_logits", "target", "back_logits")]
    for function in (sample, torch.func.grad(sample, argnums=(0, 2))):
        found = torch.func.vmap(function, in_dims=(0, 0, 0, None))(*arguments, fused["backend"])
        expected = torch.func.vmap(function, in_dims=(0, 0, 0, None))(*arguments, "reference")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        alone = [function(*(x[k] for x in arguments), "reference") for k in range(3)]
        alone = (
            [torch.stack(x) for x in zip(*alone, strict=True)] if isinstance(alone[0], tuple) else torch.stack(alone)
        )
        torch.testing.assert_close(expected, tuple(alone) if isinstance(alone, list) else alone)


def grad_of_grad(f):
    return torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())


def jvp_of_jvp(f):
    return lambda x: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (torch.ones_like(y),))[1], (x,), (x,))[1]


def grad_of_jvp(f):
    return torch.func.grad(lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1])


def jvp_of_grad(f):
    return lambda x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize(
    "twice", [torch.func.hessian, grad_of_grad, jvp_of_jvp, grad_of_jvp, jvp_of_grad], ids=lambda f: f.__name__
)
def test_second_derivatives_are_refused_by_name_and_the_reference_has_them(loss, twice):
    of, leaves, _ = loss

    def plan_alone(backend=None):
        return lambda plan: of(backend)(plan, *leaves[1:])

    with pytest.raises(RuntimeError, match=SECOND):
        twice(plan_alone())(leaves[0])
    assert twice(plan_alone("reference"))(leaves[0]).isfinite().all()


def test_dual_gradients_are_refused(loss):
    of, leaves, tangents = loss
    plan = leaves[0].clone().requires_grad_()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(of()(forward_ad.make_dual(plan, tangents[0]), *leaves[1:]), plan, create_graph=True)


@pytest.mark.skipif(not COMPILED, reason="the op is not here")
def test_the_compiled_op_itself_drops_no_tangent():
    case = with_grad(make_case(T=2))
    arguments = list(op_arguments(case))
    op, plan = getattr(torch.ops.qwen_fused, op_name({"backend": "cpp"})), arguments[0]
    words = "efe_loss has no forward-mode derivative as an op.*backend='reference'"
    for requires_grad in (True, False):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=words):
            dual = forward_ad.make_dual(plan.detach().requires_grad_(requires_grad), torch.ones_like(plan))
            op(dual, *arguments[1:])
    with pytest.raises(NotImplementedError, match="no derivative for torch.func as an op.*backend='reference'"):
        torch.func.grad(lambda x: op(x, *arguments[1:])[0])(plan.detach())


def test_nothing_is_left_behind(loss):
    """After a transform the loss takes its plain way again, with the graph's own node."""
    of, leaves, tangents = loss
    torch.func.jvp(of(), leaves, tangents)
    plan = leaves[0].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of()(plan, *leaves[1:]).backward()
    expected = torch.func.grad(of("reference"))(*leaves)
    torch.testing.assert_close(plan.grad, expected, rtol=1e-10, atol=1e-12)
