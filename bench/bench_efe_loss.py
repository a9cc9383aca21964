"""The fused EFE loss against eager torch, torch.compile and, on CUDA, CUDA graphs and Liger's losses put together.

Nothing is timed before a contender gave the loss and the gradients that the specification gives in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Call, Comparison, WrongResult, benchmark_one, default_device, refuse
from torch import Tensor

from qwen_fused.loss.dispatch import COMPILED
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss

# B, T, C, H, W; "large" is 1.1 GB of float32 logits on CUDA, past every cache on the CPU
SHAPES = {"arc": (32, 5, 10, 30, 30), "large": (256, 5, 10, 30, 30)}
CUDA_SHAPES = {**SHAPES, "large": (2800, 5, 10, 30, 30)}
WEIGHTS = EFEWeights()
LEAVES = ("plan_logits", "back_logits", "preference_logits", "prompt_colors")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# read once forward; backward reads again and writes as much
PASSES = {"forward": 1, "backward": 2, "both": 3}
# per plan logit and its backward-plan twin, exp and log as one each: two softmaxes (6 + 6), entropy, risk, pooling and
# the divergence forward (11); the softmaxes again and the superposed gradients backward (12 + 24)
OPERATIONS = {"forward": 23, "backward": 36, "both": 59}
Loss = Callable[..., Tensor]
Case = dict[str, Tensor]


def shape_of(size: str, device: torch.device) -> tuple[int, ...]:
    return (CUDA_SHAPES if device.type == "cuda" else SHAPES)[size]


def make_case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Every term that the trainer uses, on full canvases [B, T, C, H, W]."""
    B, T, C, H, W = shape
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    case = {
        "plan_logits": normal(B, T, C, H, W),
        "target": torch.randint(0, C, (B, H, W), generator=g, device=device),
        "back_logits": normal(B, T, C, H, W),
        "preference_logits": normal(B, C, H, W),
        "anchor_log_probs": torch.randn(C, H, W, generator=g, device=device).log_softmax(0),
        "prompt_colors": normal(B, C),
    }
    return {name: x.requires_grad_() if name in LEAVES else x for name, x in case.items()}


def eager(**case: Tensor) -> Tensor:
    return efe_loss(**case, weights=WEIGHTS, backend="reference").loss


def fused(**case: Tensor) -> Tensor:
    return efe_loss(**case, weights=WEIGHTS, backend=backend_of(case["plan_logits"].device)).loss


def backend_of(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "cpp"


def liger(**case: Tensor) -> Tensor:
    """The nearest that Liger's kernels compose to: cross-entropy, KL and JSD on class-last copies of the logits.

    No anchor, no prompt, no hard-cell weight; no gradient to the preference or to the backward plan.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_jsd, liger_kl_div

    plan, back = (case[name].movedim(2, -1).flatten(0, 3).contiguous() for name in ("plan_logits", "back_logits"))
    preference = case["preference_logits"][:, None].expand_as(case["plan_logits"]).movedim(2, -1).flatten(0, 3)
    last = case["plan_logits"][:, -1].movedim(1, -1).flatten(0, 2).contiguous()
    ce = liger_cross_entropy(last, case["target"].flatten())
    log_q = plan.log_softmax(-1)
    risk = liger_kl_div(log_q, preference.softmax(-1).detach(), reduction="batchmean")
    return ce + risk + 0.5 * liger_jsd(log_q, back.log_softmax(-1).detach())


def contenders(device: torch.device, *, launches_tell: bool) -> dict[str, Loss]:
    """Name -> loss; with CUDA graphs too where the cost of launches tells."""
    found: dict[str, Loss] = {backend_of(device): fused, "eager": eager, "torch.compile": compiled()}
    if device.type == "cuda":
        if launches_tell:
            found["torch.compile, graphed"] = compiled("reduce-overhead")
        try:
            import liger_kernel  # noqa: F401

            found["liger CE + KL + JSD"] = liger
        except ImportError:
            pass
    return found


@functools.cache
def compiled(mode: str | None = None) -> Loss:
    # for each shape by itself: code for any shape, which a second one would bring about, is slower
    return torch.compile(eager, fullgraph=True, mode=mode, dynamic=False)


def clear(case: Case) -> None:
    for name in LEAVES:
        case[name].grad = None


def both(loss: Loss, case: Case) -> Tensor:
    clear(case)
    value = loss(**case)
    value.backward()
    return value


def exact(case: Case) -> list[Tensor]:
    """The loss and the gradient of each leaf as the specification gives them in float64.

    It runs on a few episodes at a time, as float64 needs many times the memory of the case.
    """
    B = case["plan_logits"].shape[0]
    total, grads = torch.zeros((), dtype=torch.float64), [[] for _ in LEAVES]
    for begin in range(0, B, 32):
        part = {name: x[begin : begin + 32] if x.shape[0] == B else x for name, x in case.items()}
        part = {name: x.detach().double() if x.is_floating_point() else x for name, x in part.items()}
        for name in LEAVES:
            part[name].requires_grad_()
        share = part["target"].shape[0] / B
        total += both(eager, part).detach().cpu() * share
        for name, parts in zip(LEAVES, grads, strict=True):
            parts.append(part[name].grad * share)
    return [total, *map(torch.cat, grads)]


def error_of(loss: Loss, case: Case, right: list[Tensor]) -> float:
    """Largest error of the loss and of each gradient, over the largest value of each."""
    found = [both(loss, case).detach().cpu(), *(case[name].grad for name in LEAVES)]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, right, strict=True))


def call_of(loss: Loss, case: Case, direction: str) -> Call:
    def graph() -> Tensor:
        clear(case)
        return loss(**case)

    if direction == "backward":
        return Call(lambda value: value.backward(), graph)
    return Call(lambda _: loss(**case)) if direction == "forward" else Call(lambda _: both(loss, case))


def graphed(case: Case, device: torch.device) -> Call:
    """Forward and backward of ours as one CUDA graph.

    On leaves of its own: nodes that add up a gradient stay with the stream on which a leaf was first used.
    """
    case = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in case.items()}
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        both(fused, case)
    torch.cuda.current_stream(device).wait_stream(side)
    clear(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(**case).backward()
    return Call(lambda _: graph.replay())


def byte_count(size: str, dtype: torch.dtype, direction: str, device: torch.device) -> int:
    """Plan, back and preference are read forward; read again, and their gradients written, backward."""
    B, T, C, H, W = shape_of(size, device)
    return B * C * H * W * (2 * T + 1) * dtype.itemsize * PASSES[direction]


def compare(size: str, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Forward, backward and both, on the same inputs."""
    B, T, C, H, W = shape = shape_of(size, device)
    case, ours = make_case(shape, dtype, device), backend_of(device)
    losses = contenders(device, launches_tell=size == "arc")
    right = functools.cache(lambda: exact(case))

    @functools.cache
    def check(name: str) -> float | None:
        if name.startswith("liger"):
            # a composition of other losses is no EFE loss
            return None
        name = ours if name == f"{ours}, graphed" else name
        return refuse(name, error_of(losses[name], case, right()), TOLERANCE[dtype])

    for direction in PASSES:
        calls = {name: call_of(loss, case, direction) for name, loss in losses.items()}
        if direction == "both" and device.type == "cuda" and size == "arc":
            calls[f"{ours}, graphed"] = graphed(case, device)
        yield Comparison(
            bench="efe_loss",
            case=f"{size} {B}x{T}x{C}x{H}x{W} {str(dtype)[6:]}, {direction}",
            calls=calls,
            ours=ours,
            device=device,
            check=check,
            bytes=byte_count(size, dtype, direction, device),
            operations=B * T * C * H * W * OPERATIONS[direction],
        )


def comparisons(level: str, device: torch.device) -> Iterator[Comparison]:
    """What the suite measures."""
    if device.type == "cpu" and not COMPILED:
        raise WrongResult("the extension is not built, and there is no fused loss on this CPU without it")
    yield from compare("arc", torch.float32, device)
    if device.type == "cuda":
        yield from compare("large", torch.float32, device)
        yield from compare("large", torch.bfloat16, device)
    elif level == "full":
        yield from compare("large", torch.float32, device)


@pytest.fixture(scope="module")
def arc() -> dict[str, Comparison]:
    return dict(zip(PASSES, compare("arc", torch.float32, default_device()), strict=True))


@pytest.mark.skipif(not (torch.cuda.is_available() or COMPILED), reason="no fused backend here")
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("who", ["fused", "eager", "torch.compile"])
def test_efe_loss(benchmark, arc, who: str, direction: str) -> None:
    benchmark_one(benchmark, arc[direction], arc[direction].ours if who == "fused" else who)
