"""Expected-free-energy loss in plain torch: the specification that every faster backend is tested against.

Axes: B episodes, T plan steps, C classes, H x W canvas. With V the cells whose target is not ignored,
n = max(|V|, 1), q = softmax_C(plan), r = softmax_C(back), p = softmax_C(preference), o = target, i in V:

    hard       hard_i = [argmax_c plan_{T,c,i} != o_i];  rho = sum_i hard_i / n      (never differentiated)
    ce         sum_t s_t sum_i w_i k(o_i) (-log q_{t,i,o_i}) / sum_i k(o_i)
    risk       1/n sum_{t,i,c} q (log q - log p)
    ambiguity  1/n sum_{t,i,c} q_c h_c
    agreement  1/n sum_{t,i} KL(q|m)/2 + KL(r|m)/2,  m = (q + r) / 2
    anchor     1/n sum_i KL(p | exp(anchor))
    prompt     -1/T sum_t cos(x_t, prompt),  x_t = 1/n sum_i plan_{t,:,i}

    loss = mean over the episodes with |V| > 0 of  sigma_b sum_term weight * term

Logits of one cell further apart than the accumulating type's largest number are infinitely far apart, as in
torch's softmax; nearer than that, finite logits give finite values. risk and agreement are 0 where rounding would
make them negative, and anchor where it is by 16 eps or less: an anchor need not add up to 1.

A class forbidden by a logit of -inf has probability 0 and log-probability -inf: 0 log 0 is 0 with gradient 0,
and the logit counts as 0 in the pooled mean x_t. A target outside [0, C) that is not ignored makes its
episode NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

TERMS = ("ce", "risk", "ambiguity", "agreement", "anchor", "prompt")
# what is told of each episode, in this order where it is columns of one tensor
COLUMNS = (*TERMS, "hard", "accuracy")
HARD_MODES = ("episode", "cell", "none")
IGNORED_PREDICTION = 255


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any of the given tensors is float64, else float32."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def active_terms(
    weights: Mapping[str, float],
    *,
    back: Tensor | None,
    preference: Tensor | None,
    anchor: Tensor | None,
    obs_entropy: Tensor | None,
    prompt_colors: Tensor | None,
) -> dict[str, bool]:
    """Which terms count in the loss: those whose weight is not 0 and whose inputs are there."""
    there = {
        "ce": True,
        "risk": preference is not None,
        "ambiguity": obs_entropy is not None,
        "agreement": back is not None,
        "anchor": preference is not None and anchor is not None,
        "prompt": prompt_colors is not None,
    }
    return {name: there[name] and weights[name] != 0 for name in TERMS}


def _log_softmax(logits: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p, p, and log p with 0 where p is forbidden, so that p log p has value and gradient 0 there."""
    log_p = logits.log_softmax(dim)
    return log_p, log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)


def _direction(x: Tensor, eps: float = 1e-8) -> Tensor:
    """x over its norm along the last axis, which is held at eps or above, as in F.cosine_similarity."""
    # by the largest element first: the squares of large numbers would be infinite
    largest = x.detach().abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    x = x / largest
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).maximum(eps / largest)


def _not_negative(divergence: Tensor, rounding: float = math.inf) -> Tensor:
    """0 where a divergence came out negative, by no more than `rounding`; its gradient stays."""
    value = divergence.detach()
    return torch.where((value < 0) & (value > -rounding), divergence - value, divergence)


def efe_loss_reference(
    plan: Tensor,  # [B, T, C, H, W]
    target: Tensor,  # [B, H, W]
    *,
    weights: Mapping[str, float],
    back: Tensor | None = None,  # [B, T, C, H, W]
    preference: Tensor | None = None,  # [B, C, H, W]
    anchor: Tensor | None = None,  # [C, H, W]
    obs_entropy: Tensor | None = None,  # [C]
    prompt_colors: Tensor | None = None,  # [B, C]
    step_weight: Tensor | None = None,  # [T]
    class_weight: Tensor | None = None,  # [C]
    hard_floor: float = 0.5,
    hard_mode: str = "episode",
    ignore_index: int = -100,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss and everything reported with it; differentiable by autograd in every float argument.

    Args:
        weights: weight of each of TERMS; a term of weight 0 is not computed, except ce, which is always reported.

    Returns:
        loss (0-d), terms (name -> [B], detached), hard ratio [B], accuracy [B], solved [B] bool,
        predicted [B, H, W] uint8.
    """
    on = active_terms(
        weights, back=back, preference=preference, anchor=anchor, obs_entropy=obs_entropy, prompt_colors=prompt_colors
    )
    num_classes = plan.shape[2]
    dtype = accumulate_dtype(plan, back, preference, obs_entropy, prompt_colors)
    # as int64, as in a narrower type torch would wrap an ignore_index that does not fit
    target = target.long()
    valid = target != ignore_index
    in_range = (target >= 0) & (target < num_classes)
    malformed = (valid & ~in_range).flatten(1).any(1)
    label = torch.where(in_range & valid, target, 0)
    cells = valid.sum((1, 2))
    count = cells.clamp_min(1).to(dtype)
    has_cells = cells > 0

    # ignored cells become 0 before anything reads them: what they held reaches neither values nor gradients
    plan_x = torch.where(valid[:, None, None], plan.to(dtype), 0.0)
    log_q, q, log_q0 = _log_softmax(plan_x, 2)

    predicted = plan_x[:, -1].argmax(1)
    right = (predicted == label) & valid
    hard = valid & ~right
    hard_ratio = hard.sum((1, 2)).to(dtype) / count
    accuracy = right.sum((1, 2)).to(dtype) / count
    solved = has_cells & ~hard.flatten(1).any(1)

    def per_cell(x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) / count

    ce = _cross_entropy(log_q, label, valid, hard, step_weight, class_weight, hard_floor, hard_mode)
    terms = {"ce": ce}
    if preference is not None and (on["risk"] or on["anchor"]):
        preference_x = torch.where(valid[:, None], preference.to(dtype), 0.0)
        log_p, p, log_p0 = _log_softmax(preference_x, 1)
        if on["risk"]:
            # a forbidden q costs nothing whatever p is; a forbidden p under a live q costs infinitely much
            log_p_seen = torch.where(q > 0, log_p[:, None], 0.0)
            terms["risk"] = _not_negative(per_cell(q * (log_q0 - log_p_seen) * valid[:, None, None]))
        if anchor is not None and on["anchor"]:
            log_a = torch.where(valid[:, None] & (p > 0), anchor.to(dtype), 0.0)
            anchored = per_cell(p * (log_p0 - log_a) * valid[:, None])
            terms["anchor"] = _not_negative(anchored, 16 * torch.finfo(dtype).eps)
    if obs_entropy is not None and on["ambiguity"]:
        mass = torch.where(valid[:, None, None], q, 0.0).sum((1, 3, 4)) / count[:, None]
        terms["ambiguity"] = mass @ obs_entropy.to(dtype)
    if back is not None and on["agreement"]:
        back_x = torch.where(valid[:, None, None], back.to(dtype), 0.0)
        _, r, log_r0 = _log_softmax(back_x, 2)
        m = 0.5 * (q + r)
        log_m = torch.where(m > 0, m, 1.0).log()
        divergence = 0.5 * (q * (log_q0 - log_m) + r * (log_r0 - log_m))
        terms["agreement"] = _not_negative(per_cell(divergence * valid[:, None, None]))
    if prompt_colors is not None and on["prompt"]:
        # divided first: the sum of large numbers would be infinite
        pooled = torch.where(plan_x == -torch.inf, 0.0, plan_x / count.view(-1, 1, 1, 1, 1)).sum((3, 4))
        prompt = torch.where(has_cells[:, None], prompt_colors.to(dtype), 0.0)
        terms["prompt"] = -(_direction(pooled) * _direction(prompt)[:, None]).sum(-1).mean(1)

    sigma = torch.ones_like(hard_ratio)
    if hard_mode == "episode":
        sigma = hard_floor + (1 - hard_floor) * hard_ratio
    sigma = sigma.masked_fill(malformed, torch.nan)
    total = torch.zeros_like(count)
    for name, term in terms.items():
        if on[name]:
            total = total + weights[name] * term
    loss = torch.where(has_cells, sigma * total, 0.0).sum() / has_cells.sum().clamp_min(1)

    terms["hard"] = hard_ratio
    reported = {name: term.detach() for name, term in terms.items()}
    predicted = torch.where(valid, predicted, IGNORED_PREDICTION).to(torch.uint8)
    return loss, reported, hard_ratio, accuracy, solved, predicted


def _cross_entropy(
    log_q: Tensor,  # [B, T, C, H, W]
    label: Tensor,  # [B, H, W]
    valid: Tensor,  # [B, H, W]
    hard: Tensor,  # [B, H, W]
    step_weight: Tensor | None,
    class_weight: Tensor | None,
    hard_floor: float,
    hard_mode: str,
) -> Tensor:
    """Weighted cross-entropy per episode [B]; only the last step when no step weights are given."""
    dtype = log_q.dtype
    kappa = valid.to(dtype)
    if class_weight is not None:
        kappa = torch.where(valid, class_weight.to(dtype)[label], 0.0)
    per_cell = kappa
    if hard_mode == "cell":
        per_cell = torch.where(hard, kappa, kappa * hard_floor)
    if step_weight is None:
        log_q, weight = log_q[:, -1:], per_cell[:, None]
    else:
        weight = per_cell[:, None] * step_weight.to(dtype)[:, None, None]
    index = label[:, None, None].expand(-1, log_q.shape[1], 1, -1, -1)
    nll = -log_q.gather(2, index)[:, :, 0]
    # weight 0 drops the cell even where its target is forbidden and its cost infinite
    cost = torch.where(weight != 0, weight * nll, 0.0).flatten(1).sum(1)
    mass = kappa.flatten(1).sum(1)
    return torch.where(mass != 0, cost / torch.where(mass != 0, mass, 1.0), 0.0)
