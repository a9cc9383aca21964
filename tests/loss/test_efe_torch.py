"""The fused losses inside torch: compile, fake tensors, autocast, second derivatives, bad input, graphs and syncs."""

from __future__ import annotations

import pytest
import torch
from efe_cases import ALL_TERMS, assert_agrees, make_case, op_arguments, op_name, run, with_grad
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_fused.loss import checks
from qwen_fused.loss import dispatch as ops
from qwen_fused.loss.autograd import HARD_MODE
from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(fused, dtype):
    case = with_grad(make_case(T=2, H=2, dtype=dtype), fused["device"])
    arguments = op_arguments(case)
    forward = getattr(torch.ops.qwen_fused, op_name(fused))
    torch.library.opcheck(forward.default, arguments)
    with torch.no_grad():
        out = forward(*arguments)
    backward = getattr(torch.ops.qwen_fused, op_name(fused) + "_backward")
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    one = torch.ones_like(out[0])
    torch.library.opcheck(backward.default, (one, *plain[:10], *out[3:], *plain[10:], [True] * 5))


@pytest.mark.parametrize("backend_of_compile", ["aot_eager", "inductor"])
def test_compiles_whole(fused, backend_of_compile):
    """One graph, the results of eager, and no second compilation for the same shapes."""
    if backend_of_compile == "inductor" and fused["device"] == "cpu" and fused["backend"] == "triton":
        backend_of_compile = "aot_eager_decomp_partition"

    def step(scale, **case):
        out = efe_loss(**case, weights=ALL_TERMS, backend=fused["backend"])
        return out.loss * scale, out.terms, out.predicted

    compiled = torch.compile(step, fullgraph=True, backend=backend_of_compile)
    case = make_case(T=2, H=2, dtype=torch.float32)
    expected, grads = run(with_grad(case, fused["device"]), upstream=2.0, weights=ALL_TERMS, backend=fused["backend"])
    leaves = with_grad(case, fused["device"])
    loss, terms, predicted = compiled(torch.tensor(2.0, device=fused["device"]), **leaves)
    loss.backward()
    assert torch.equal(loss / 2, expected.loss)
    assert torch.equal(predicted, expected.predicted) and terms.keys() == expected.terms.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(leaves[name].grad, grad, rtol=0, atol=0, msg=name)
    torch._dynamo.reset()


def test_compiled_autograd_traces_the_backward_pass(fused):
    """Its tracer refuses a node that has marked outputs as without gradient, and counts edges in its own way."""
    case = make_case(T=2, H=2, dtype=torch.float32)
    _, grads = run(with_grad(case, fused["device"]), weights=ALL_TERMS, backend=fused["backend"])
    leaves, traced = with_grad(case, fused["device"]), []

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        efe_loss(**leaves, weights=ALL_TERMS, backend=fused["backend"]).loss.backward()
    assert traced
    for name, grad in grads.items():
        assert torch.equal(leaves[name].grad, grad), name
    torch._dynamo.reset()


@pytest.mark.parametrize("wanted", ["plan_logits", "back_logits", "preference_logits", "obs_entropy", "prompt_colors"])
@pytest.mark.parametrize("absent", [(), ("back_logits", "anchor_log_probs"), ("preference_logits", "step_weight")])
def test_one_gradient_alone(fused, wanted, absent):
    """A node's edges are those of the tensors that are there, and each gradient finds its own."""
    if wanted in absent:
        pytest.skip("not there")
    case = {name: x for name, x in make_case(T=2, H=2, dtype=torch.float32).items() if name not in absent}
    _, grads = run(with_grad(case, fused["device"]), weights=ALL_TERMS, backend=fused["backend"])
    alone = {name: x.to(fused["device"]) for name, x in case.items()}
    alone[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(efe_loss(**alone, weights=ALL_TERMS, backend=fused["backend"]).loss, alone[wanted])
    if fused["device"] == "cuda":
        # a kernel of its own, which the compiler fuses otherwise
        assert_agrees(grad, grads[wanted].double(), torch.float32, wanted)
    else:
        assert torch.equal(grad, grads[wanted])


def test_target_out_of_range_in_a_compiled_step():
    """Nothing can be read on the host while tracing; the kernel still refuses, on the CPU."""
    if not ops.COMPILED:
        pytest.skip(f"no extension: {ops.backends.EXTENSION_ERROR}")
    case = make_case(ignored=0.0)
    case["target"][0, 0, 0] = 7
    compiled = torch.compile(lambda: efe_loss(**case, backend="cpp").loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\) or ignore_index -100, got 7 \(1 cells outside\)"):
        compiled()
    torch._dynamo.reset()


def test_reference_compiles_whole():
    case = make_case(T=2, H=2)
    compiled = torch.compile(
        lambda **case: efe_loss(**case, weights=ALL_TERMS, backend="reference").loss,
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = with_grad(case)
    compiled(**leaves).backward()
    _, grads = run(with_grad(case), weights=ALL_TERMS, backend="reference")
    for name, grad in grads.items():
        assert_agrees(leaves[name].grad, grad, torch.float64, name)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake_tensors(fused, dtype):
    case = make_case(dtype=dtype)
    case["plan_logits"] = case["plan_logits"].movedim(2, -1).contiguous().movedim(-1, 2)
    real, grads = run(with_grad(case, fused["device"]), weights=ALL_TERMS, backend=fused["backend"])
    leaves = with_grad(case, fused["device"])
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in leaves.items()}
        out, fake_grads = run(fake, weights=ALL_TERMS, backend=fused["backend"])
    assert out.loss.dtype == real.loss.dtype and out.predicted.shape == real.predicted.shape
    for name, grad in grads.items():
        assert (fake_grads[name].dtype, fake_grads[name].stride()) == (grad.dtype, grad.stride()), name


def test_autocast_changes_nothing(fused):
    case = make_case(dtype=torch.float32)
    case["plan_logits"] = case["plan_logits"].bfloat16()
    plain, grads = run(with_grad(case, fused["device"]), weights=ALL_TERMS, backend=fused["backend"])
    with torch.autocast(fused["device"], torch.bfloat16):
        cast, cast_grads = run(with_grad(case, fused["device"]), weights=ALL_TERMS, backend=fused["backend"])
    assert cast.loss.dtype == torch.float32 and torch.equal(cast.loss, plain.loss)
    for name, grad in grads.items():
        assert cast_grads[name].dtype == grad.dtype and torch.equal(cast_grads[name], grad), name


def test_second_derivative_is_refused(fused):
    case = with_grad(make_case(T=2), fused["device"])
    out = efe_loss(**case, weights=ALL_TERMS, backend=fused["backend"])
    (grad,) = torch.autograd.grad(out.loss, case["plan_logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="efe_loss has no second derivative"):
        grad.square().sum().backward()


def test_second_backward_is_refused_and_retained_graphs_repeat(fused):
    case = with_grad(make_case(T=2), fused["device"])
    out = efe_loss(**case, weights=ALL_TERMS, backend=fused["backend"])
    (first,) = torch.autograd.grad(out.loss, case["plan_logits"], retain_graph=True)
    (second,) = torch.autograd.grad(out.loss, case["plan_logits"])
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


def test_only_the_loss_is_differentiable(fused):
    out = efe_loss(**with_grad(make_case(T=2), fused["device"]), weights=ALL_TERMS, backend=fused["backend"])
    assert out.loss.requires_grad
    reports = (*out.terms.values(), out.hard_ratio, out.accuracy, out.solved, out.predicted)
    assert not any(x.requires_grad for x in reports)


def test_without_grad_no_graph(fused):
    with torch.no_grad():
        out = efe_loss(**with_grad(make_case(T=2), fused["device"]), backend=fused["backend"])
    assert not out.loss.requires_grad


def test_predicted_may_be_written_into(fused):
    """Only where the mask is per cell does backward need it; then autograd says so."""
    for hard_mode in ("episode", "cell"):
        case = with_grad(make_case(T=2), fused["device"])
        out = efe_loss(**case, hard_mode=hard_mode, backend=fused["backend"])
        out.predicted.fill_(0)
        if hard_mode == "episode":
            out.loss.backward()
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.loss.backward()


def test_target_out_of_range(fused, monkeypatch):
    case = {name: x.to(fused["device"]) for name, x in make_case(ignored=0.0).items()}
    case["target"][0, 1, 1], case["target"][1, 0, 0] = 5, -3
    message = r"target must be in \[0, 5\) or ignore_index -100, got 5 \(2 cells outside\)"
    if fused["backend"] == "cpp":
        with pytest.raises(ValueError, match=message):
            efe_loss(**case, backend="cpp")
        return
    leaves = with_grad(case, fused["device"])
    out, grads = run(leaves, backend="triton")
    assert out.loss.isnan() and grads["plan_logits"].isnan().any()
    monkeypatch.setattr(checks, "check_targets", checks.check_targets)
    checks.set_check_targets(True)
    with pytest.raises(ValueError, match=message):
        efe_loss(**case, backend="triton")


def test_a_bad_episode_leaves_the_others_gradients(fused):
    if fused["backend"] == "cpp":
        return
    case = make_case()
    case["target"][1, 0, 0], case["target"][1, 0, 1] = 5, -100
    _, grads = run(with_grad(case, fused["device"]), backend="triton", weights=ALL_TERMS)
    grad = grads["plan_logits"]
    assert grad[0].isfinite().all() and grad[1].isnan().any()
    # a cell that does not count is out of even this
    assert (grad[1, :, :, 0, 1] == 0).all() and (grads["preference_logits"][1, :, 0, 1] == 0).all()


def test_auto_picks_by_device():
    case = make_case(T=2)
    expected = "cpp" if ops.COMPILED else "reference"
    chosen = efe_loss(**case).loss
    assert torch.equal(chosen, efe_loss(**case, backend=expected).loss)


def test_auto_leaves_many_classes_on_cuda_to_plain_torch(monkeypatch):
    """Where Triton would compile for minutes; no device is asked."""
    monkeypatch.setattr(ops.backends, "HAS_TRITON", True)
    on_cuda = type("Plan", (), {"device": torch.device("cuda")})()
    for classes, expected in ((1, "triton"), (16, "triton"), (17, "reference"), (64, "reference")):
        assert ops.resolve_backend("auto", on_cuda, classes) == expected


def test_unavailable_backends_say_why(monkeypatch):
    case = make_case()
    monkeypatch.setattr(ops, "COMPILED", False)
    monkeypatch.setattr(ops.backends, "EXTENSION_ERROR", "not built: no compiler")
    with pytest.raises(ValueError, match="backend='cpp' must have the compiled extension.*not built: no compiler"):
        efe_loss(**case, backend="cpp")
    monkeypatch.setattr(ops.triton_loss, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend='triton' must have CUDA tensors.*got plan_logits on cpu"):
        efe_loss(**case, backend="triton")


@pytest.mark.gpu
def test_cuda_graph_and_no_sync():
    case = with_grad(make_case(B=4, C=10, H=30, W=30, dtype=torch.float32), "cuda")
    expected, grads = run(case, weights=EFEWeights(), backend="triton")
    # the graph behind it would keep nodes of this stream alive
    expected = expected.loss.detach().clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in case.values():
            x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, captured = run(case, weights=EFEWeights(), backend="triton")
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(out.loss, expected)
    for name, grad in captured.items():
        if grad is not None:
            assert torch.equal(grad, grads[name]), name


@pytest.mark.gpu
def test_three_launches():
    case = with_grad(make_case(B=4, C=10, H=30, W=30, dtype=torch.float32, weighted=False), "cuda")
    run(case, backend="triton")
    for x in case.values():
        x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = efe_loss(**case, backend="triton")
        out.loss.backward()
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages() if "efe_" in event.key]
    assert sorted(kernels) == ["efe_backward_kernel", "efe_finish_kernel", "efe_forward_kernel"]


def test_flat_cross_entropy_agrees_with_the_reference(fused):
    logits = torch.randn(40, 6, dtype=torch.float64, device=fused["device"], requires_grad=True)
    target = torch.randint(0, 6, (40,), device=fused["device"])
    for hard_mode in HARD_MODE:
        out = hard_cell_cross_entropy(logits, target, hard_mode=hard_mode, backend=fused["backend"])
        expected = hard_cell_cross_entropy(logits, target, hard_mode=hard_mode, backend="reference")
        assert out.predicted.shape == target.shape and torch.equal(out.predicted, expected.predicted)
        found, right = (torch.autograd.grad(x.loss, logits)[0] for x in (out, expected))
        assert_agrees(found, right.cpu(), torch.float64, hard_mode)
