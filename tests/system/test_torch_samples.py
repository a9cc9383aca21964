"""torch's own test samples (OpInfo, its optimizer database) against ours: what a peer asks of an op, asked of these.

They ship inside torch. What does not apply is named with its reason, so that a new kind of sample fails here first.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import parameter
from torch import Tensor, nn

import qwen_fused as qf

pytestmark = pytest.mark.slow
TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=1e-6), torch.float64: dict(rtol=1e-10, atol=1e-12)}


@pytest.fixture(scope="module")
def ops() -> dict[str, Any]:
    """Name -> OpInfo."""
    # torch's samples come with its test runner, which asks for a package that they have no use for
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    from torch.testing._internal.common_methods_invocations import foreach_reduce_op_db, op_db

    return {op.name: op for op in [*foreach_reduce_op_db, *op_db]}


@pytest.fixture(scope="module")
def adamw(ops):
    """OptimizerInfo of AdamW."""
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)


def samples(ops, name: str, dtype: torch.dtype) -> list[Any]:
    found = list(ops[name].sample_inputs("cpu", dtype, requires_grad=False))
    assert found
    return found


def hard_loss(logits: Tensor, target: Tensor, **options) -> Tensor:
    """F.cross_entropy's arguments in ours: rows [N, C], no part of the loss weighted by what is missed."""
    weight = options.get("weight")
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    ignored = options.get("ignore_index", -100)
    return qf.hard_cell_cross_entropy(
        rows, target.reshape(-1), class_weight=weight, hard_mode="none", ignore_index=ignored
    ).loss


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy(ops, dtype):
    left_out = {"soft targets: a cell has one colour": 0}
    for sample in samples(ops, "nn.functional.cross_entropy", dtype):
        logits, (target,), options = sample.input, sample.args, dict(sample.kwargs)
        if target.is_floating_point():
            left_out["soft targets: a cell has one colour"] += 1
            continue
        reduction, weight = options.pop("reduction", "mean"), options.get("weight")
        want = F.cross_entropy(logits, target, reduction=reduction, **options)
        counted = (target != options.get("ignore_index", -100)).to(dtype)
        share = counted * (1.0 if weight is None else weight[target.clamp_min(0)])
        if reduction == "mean":
            got = hard_loss(logits, target, **options)
        elif reduction == "sum":
            got = hard_loss(logits, target, **options) * share.sum()
        else:
            # each row alone is a mean of one, in which its weight cancels
            rows = [hard_loss(logits[i : i + 1], target[i : i + 1], **options) for i in range(len(logits))]
            got = torch.stack(rows) * share
        torch.testing.assert_close(got, want, **TOLERANCE[dtype])
    assert left_out == {"soft targets: a cell has one colour": 10}


def term(name: str, plan: Tensor, **inputs) -> Tensor:
    """One term of the loss [R] for R episodes of one cell each; plan [R, C]."""
    weights = qf.EFEWeights(
        **{n: float(n == name) for n in ("ce", "risk", "ambiguity", "agreement", "anchor", "prompt")}
    )
    out = qf.efe_loss(
        plan[:, None, :, None, None], torch.zeros(len(plan), 1, 1, dtype=torch.long), weights=weights,
        hard_mode="none", **inputs,
    )  # fmt: skip
    return out.terms[name]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kl_divergence(ops, dtype):
    """KL(target ‖ input) is the risk of a plan that is the target under the preference that is the input."""
    for sample in samples(ops, "nn.functional.kl_div", dtype):
        log_p, (target,), options = sample.input, sample.args, sample.kwargs
        log_q = target if options["log_target"] else target.log()
        if log_p.dim() == 1:
            log_p, log_q = log_p[None], log_q[None]
        # theirs sums over whatever dimension is normalised, ours over colours
        (axis,) = [d for d in range(2) if torch.allclose(log_q.logsumexp(d), log_q.new_zeros(()), atol=1e-5)][:1]
        log_p, log_q = log_p.movedim(axis, 1), log_q.movedim(axis, 1)
        risk = term("risk", log_q, preference_logits=log_p[..., None, None])
        want = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        torch.testing.assert_close(risk, want, **TOLERANCE[dtype])
        if sample.input.dim() == 2 or options["reduction"] != "batchmean":
            # "none" has no sum over colours in it, and a batchmean divides by the first dimension
            scale = {"sum": 1, "mean": log_p.numel(), "batchmean": sample.input.shape[0], "none": None}
            if scale[options["reduction"]]:
                with warnings.catch_warnings():
                    # that torch itself may change what "mean" divides by
                    warnings.simplefilter("ignore")
                    whole = F.kl_div(sample.input, target, **options)
                torch.testing.assert_close(risk.sum() / scale[options["reduction"]], whole, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cosine_similarity(ops, dtype):
    """The prompt term of one cell is minus the cosine of its logits and the prompt's colours."""
    left_out = {"eps is fixed at 1e-8": 0, "scalars have no direction": 0}
    for sample in samples(ops, "nn.functional.cosine_similarity", dtype):
        x, (y,), options = sample.input, sample.args, sample.kwargs
        if "eps" in options:
            left_out["eps is fixed at 1e-8"] += 1
            continue
        if x.dim() == 0:
            left_out["scalars have no direction"] += 1
            continue
        x, y = torch.broadcast_tensors(x, y)
        axis = options.get("dim", 1)
        rows_x, rows_y = (z.movedim(axis, -1).reshape(-1, z.shape[axis]) for z in (x, y))
        got = -term("prompt", rows_x.contiguous(), prompt_colors=rows_y.contiguous())
        torch.testing.assert_close(got, F.cosine_similarity(x, y, dim=axis).reshape(-1), **TOLERANCE[dtype])
    assert left_out == {"eps is fixed at 1e-8": 1, "scalars have no direction": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_foreach_norm(ops, dtype):
    left_out = dict.fromkeys((0, 1, -1, -2, float("-inf")), 0)
    op = ops["_foreach_norm"]
    assert {torch.complex64, torch.complex128} < set(op.dtypes)
    for sample in samples(ops, "_foreach_norm", dtype):
        order = sample.kwargs["ord"]
        if order in left_out:
            # gradients are clipped by their 2-norm or their largest element
            left_out[order] += 1
            continue
        stats = qf.GroupGradNorm({str(i): [parameter(x)] for i, x in enumerate(sample.input)}).measure()
        got = {2: stats.norm, float("inf"): stats.max_abs}[order]
        wide = [x.double() for x in sample.input]
        want = [torch.linalg.vector_norm(x, order) if x.numel() else x.new_zeros(()) for x in wide]
        torch.testing.assert_close(got.double(), torch.stack(want), rtol=4e-7, atol=0, equal_nan=True)
    assert all(left_out.values())
    for refused in set(op.dtypes) - {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        grad = torch.ones(3).to(refused)
        if not refused.is_complex:
            # torch itself lets no parameter have such a gradient
            continue
        with pytest.raises(ValueError, match="must be float16, bfloat16, float32 or float64"):
            qf.GroupGradNorm({"p": [parameter(grad)]}).measure()


# until the second moment of the first gradients is two thirds gone
STEPS = 1000
INAPPLICABLE = {"capturable": "a CUDA graph's; a fused step is always capturable there"}


def runs(info, dtype: torch.dtype):
    """(description, ours, theirs): the same weights and gradients under MasterAdamW and plain AdamW, STEPS long."""
    for case in info.optim_inputs_func(device="cuda"):
        options = {name: value for name, value in case.kwargs.items() if name not in INAPPLICABLE}
        ours = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).to(dtype)), nn.Parameter(torch.ones(5).to(dtype))]
        theirs = [nn.Parameter(p.detach().float()) for p in ours]
        pair = qf.MasterAdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            for p, q in zip(ours, theirs, strict=True):
                # large at first: without its largest second moment amsgrad would be AdamW
                gradient = (torch.randn(p.shape, generator=generator) * (10.0 if step < 3 else 0.1)).to(dtype)
                p.grad, q.grad = gradient, gradient.float()
            for optimizer in pair:
                optimizer.step()
        yield case.desc, ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw(adamw, dtype):
    ends = {}
    for name, ours, theirs in runs(adamw, dtype):
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                p.float(), q.detach().to(dtype).float(), rtol=torch.finfo(dtype).eps * 2, atol=1e-5
            )
        ends[name] = torch.cat([q.detach().flatten() for q in theirs])
    # every option shows: enough steps were taken
    for option, beside in (("amsgrad", "nonzero weight_decay"), ("maximize", "nonzero weight_decay"),
                           ("nonzero weight_decay", "default"), ("non-default lr", "default")):  # fmt: skip
        assert (ends[option] - ends[beside]).abs().max() > 1e-3, option


def test_adamw_refuses_what_torch_refuses(adamw):
    told = {UserWarning: 0, ValueError: 0, TypeError: 0}
    for case in adamw.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        params = [nn.Parameter(torch.ones(2))] if given.params is None else given.params
        told[case.error_type] += 1
        if case.error_type is UserWarning:
            with pytest.warns(UserWarning, match=case.error_regex):
                qf.MasterAdamW(params, **given.kwargs)
        else:
            with pytest.raises(case.error_type, match=case.error_regex):
                qf.MasterAdamW(params, **given.kwargs)
    assert all(told.values())
