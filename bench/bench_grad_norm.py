"""Per-group gradient norms and clipping against what a user would otherwise call.

Nothing is timed before ours gave the norms and the clipped gradients that float64 gives; the others' errors are told.
`read` is a plain sum over the same gradients: what reading them once costs, and so the ceiling of `measure`.
"torch foreach" gives the 2-norms alone; "foreach, 2 and max" the largest elements too, still without the count of NaN
and Inf and the tensor that they are in, which ours gives in the same read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Call, Comparison, WrongResult, benchmark_one, default_device, refuse
from material import HALF_BILLION, ONE_AND_A_HALF_BILLION
from torch import nn

from qwen_fused import backends
from qwen_fused.norms.group_grad_norm import GroupGradNorm

QWEN = {"qwen2.5-0.5b": HALF_BILLION, "qwen2.5-1.5b": ONE_AND_A_HALF_BILLION}
SMALL = "2000 small"
TITLES = ("measure", "measure + clip", "measure + clip, within bounds")
LOOSE = 1e9
LIMIT = 1e-5
Groups = dict[str, list[nn.Parameter]]


def shapes_of(case: str) -> dict[str, list[torch.Size]]:
    """Group -> shapes; of a Qwen's config alone, no weights."""
    if case == SMALL:
        return {f"group{i}": [torch.Size([16, 16])] * 500 for i in range(4)}
    from transformers import AutoModel, Qwen2Config

    config = Qwen2Config(**QWEN[case])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    groups: dict[str, list[torch.Size]] = {"embeddings": [], "lower": [], "upper": []}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        half = config.num_hidden_layers // 2
        group = "embeddings" if name.startswith("embed") else "lower" if layer is not None and layer < half else "upper"
        groups[group].append(parameter.shape)
    return groups


def make(case: str, dtype: torch.dtype, device: torch.device) -> Groups:
    generator = torch.Generator(device).manual_seed(0)
    groups: Groups = {}
    for group, shapes in shapes_of(case).items():
        groups[group] = []
        for shape in shapes:
            # the parameter itself is never touched: one element stands for it
            p = nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape))
            p.grad = torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(1e-2)
            groups[group].append(p)
    return groups


def contenders(groups: Groups, bound: float) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Title -> name -> a call; each call of a title does the same work, the first one is ours."""
    norms = GroupGradNorm(groups)
    grads = {name: [p.grad for p in group] for name, group in groups.items()}

    def ours_clip(limit: float) -> torch.Tensor:
        stats = norms.measure()
        norms.clip_(stats, limit)
        return stats.norm

    def torch_clip(limit: float) -> torch.Tensor:
        return torch.stack([torch.nn.utils.clip_grad_norm_(group, limit, foreach=True) for group in groups.values()])

    def foreach() -> torch.Tensor:
        return torch.stack([torch.nn.utils.get_total_norm(group, foreach=True) for group in grads.values()])

    def foreach_both() -> torch.Tensor:
        norms = [[torch.nn.utils.get_total_norm(g, p, foreach=True) for p in (2.0, torch.inf)] for g in grads.values()]
        return torch.stack([torch.stack(pair) for pair in norms])[:, 0]

    def naive() -> torch.Tensor:
        return torch.tensor([sum(g.norm().item() ** 2 for g in group) ** 0.5 for group in grads.values()])

    def read() -> torch.Tensor:
        return torch.stack([torch.stack([g.sum() for g in group]).sum() for group in grads.values()])

    return {
        "measure": {
            "qwen-fused": lambda: norms.measure().norm,
            "torch foreach": foreach,
            "foreach, 2 and max": foreach_both,
            ".item() loop": naive,
            "read": read,
        },
        "measure + clip": {"qwen-fused": lambda: ours_clip(bound), "clip_grad_norm_": lambda: torch_clip(bound)},
        "measure + clip, within bounds": {
            "qwen-fused": lambda: ours_clip(LOOSE),
            "clip_grad_norm_": lambda: torch_clip(LOOSE),
        },
    }


def exact(groups: Groups) -> torch.Tensor:
    """float64 norms, tensor by tensor so that nothing large is copied at once."""
    squares = [[p.grad.double().square().sum() for p in group] for group in groups.values()]
    return torch.stack([torch.stack(group).sum().sqrt() for group in squares]).cpu()


def error_of(name: str, call: Callable, groups: Groups, limit: float | None, dtype: torch.dtype) -> float | None:
    """Largest relative error of the norms; of ours, the clipped gradients are looked at too.

    Leaves the gradients clipped, so that later clips find the same work.
    """
    before = exact(groups)
    error = ((call().double().cpu() - before).abs() / before).max().item()
    if name == "qwen-fused":
        refuse(name, error, LIMIT)
        bounded = before if limit is None else before.minimum(torch.full_like(before, limit))
        clipped = ((exact(groups) - bounded).abs() / bounded).max().item()
        refuse(f"{name}'s clipping", clipped, max(LIMIT, torch.finfo(dtype).eps))
    for group in groups.values():
        for p in group:
            p.grad.mul_(2.0)
    # a sum of elements has nothing to be compared with
    return None if name == "read" else error


def compare(case: str, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Measuring; measuring and clipping; and clipping what need not be clipped."""
    groups = make(case, dtype, device)
    gradients = [p.grad for group in groups.values() for p in group]
    size, count = sum(g.numel() * g.element_size() for g in gradients), sum(g.numel() for g in gradients)
    bound = 0.5 * exact(groups).min().item()
    for title, by_name in contenders(groups, bound).items():
        limit = {"measure": None, "measure + clip": bound}.get(title, LOOSE)

        @functools.cache
        def check(name: str, by_name=by_name, limit=limit) -> float | None:
            return error_of(name, by_name[name], groups, limit, dtype)

        # what was clipped is within bounds: before each call, out of the time, the gradients grow again
        prepare = functools.partial(torch._foreach_mul_, gradients, 2.0) if title == "measure + clip" else None
        yield Comparison(
            bench="grad_norm",
            case=f"{case}, {len(gradients)} tensors {str(dtype)[6:]}, {title}",
            calls={name: Call(lambda _, call=call: call(), prepare) for name, call in by_name.items()},
            ours="qwen-fused",
            device=device,
            check=check,
            # clipping reads once more and writes, where a factor is not 1
            bytes=size * (3 if title == "measure + clip" else 1),
            # a square, a sum, a maximum; and a product with the factor
            operations=count * (4 if title == "measure + clip" else 3),
        )


def comparisons(level: str, device: torch.device) -> Iterator[Comparison]:
    """What the suite measures."""
    if not backends.has_kernel("group_grad_norm", device.type):
        raise WrongResult(f"the extension is not built for {device.type}: {backends.build_command()}")
    yield from compare(SMALL, torch.float32, device)
    if device.type == "cuda":
        yield from compare("qwen2.5-1.5b", torch.bfloat16, device)
    if level == "full":
        yield from compare("qwen2.5-0.5b", torch.float32, device)


@pytest.fixture(scope="module")
def small() -> dict[str, Comparison]:
    return dict(zip(TITLES, compare(SMALL, torch.float32, default_device()), strict=True))


@pytest.mark.skipif(not backends.has_kernel("group_grad_norm", default_device().type), reason="no extension here")
@pytest.mark.parametrize(
    "title, who",
    [
        ("measure", "qwen-fused"),
        ("measure", "torch foreach"),
        ("measure", "foreach, 2 and max"),
        ("measure", ".item() loop"),
        ("measure + clip", "qwen-fused"),
        ("measure + clip", "clip_grad_norm_"),
        ("measure + clip, within bounds", "qwen-fused"),
        ("measure + clip, within bounds", "clip_grad_norm_"),
    ],
)
def test_grad_norm(benchmark, small, title: str, who: str) -> None:
    benchmark_one(benchmark, small[title], who)
