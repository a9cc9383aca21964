"""The backward pass over the tiles: the gradient of every term at once, written where it belongs.

Every term is a potential phi with dL/dx_c = q_c (phi_c - sum_k q_k phi_k). With a = upstream / episodes / n:

    risk       a w_risk (log q - log p)
    ambiguity  a w_ambiguity h
    agreement  a w_agreement / 2 (log q - log m), and the same of r for back
    anchor     a w_anchor (log p - log anchor) of p, for preference, to which risk adds a w_risk (T p - sum_t q)

What is the same for every class drops out of phi: (x - max) / ln 2 stands for log2 q, and log sum exp is not needed.
Cross-entropy adds k (q - delta) and the prompt its pooled gradient.
"""

import triton.language as tl

from .efe_tile import (
    FLOOR,
    LN_2,
    TINY,
    W_AGREEMENT,
    W_AMBIGUITY,
    W_ANCHOR,
    W_CE,
    W_RISK,
    cells,
    load_classes,
    log2,
    number,
    preferred,
    softmax,
    tile_of_cells,
    unpacked,
)
from .launcher import jit_unspecialized


@jit_unspecialized()
def efe_backward_kernel(
    plan,
    target,
    back,
    preference,
    anchor,
    obs_entropy,  # [C]
    step_weight,
    class_weight,
    annealed,  # [7]
    predicted,  # [B, P]
    upstream,  # [1]
    coef,  # [B + 1, 2]: sigma / n and sigma / sum of class weights; then 1 / episodes
    d_pooled,  # [B, T, C]
    obs_entropy_share,  # [C] and [B, C]: gradients before the upstream factor
    prompt_colors_share,
    d_plan,
    d_back,
    d_preference,
    d_obs_entropy,
    d_prompt_colors,
    plan_stride,
    target_stride,
    back_stride,
    preference_stride,
    anchor_stride,
    d_plan_stride,
    d_back_stride,
    d_preference_stride,
    ignore_index: tl.int64,
    hard_floor: tl.float64,
    w_ce: tl.float64,
    w_risk: tl.float64,
    w_ambiguity: tl.float64,
    w_agreement: tl.float64,
    w_anchor: tl.float64,
    B: tl.int32,
    P: tl.int32,
    W: tl.int32,
    T: tl.int32,
    tiles: tl.int32,
    C: tl.constexpr,
    RISK: tl.constexpr,
    AMBIGUITY: tl.constexpr,
    AGREEMENT: tl.constexpr,
    ANCHOR: tl.constexpr,
    PROMPT: tl.constexpr,
    STEP_WEIGHT: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    HARD_CELL: tl.constexpr,
    ANNEALED: tl.constexpr,
    D_PLAN: tl.constexpr,
    D_BACK: tl.constexpr,
    D_PREFERENCE: tl.constexpr,
    D_OBS_ENTROPY: tl.constexpr,
    D_PROMPT_COLORS: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, tile, cell, cell_in, valid, known, label, kappa = tile_of_cells(
        target, target_stride, ignore_index, class_weight, tiles, P, W, C, CLASS_WEIGHT, FLAT, ACC, BLOCK_P
    )
    scale = tl.load(upstream).to(ACC) * tl.load(coef + 2 * B)
    if tile == 0:
        if D_PROMPT_COLORS:
            share = load_classes(prompt_colors_share + b * C, 1, True, C, ACC)
            for c in tl.static_range(C):
                tl.store(d_prompt_colors + b * C + c, scale * share[c])
        if D_OBS_ENTROPY:
            share = load_classes(obs_entropy_share, 1, True, C, ACC)
            for c in tl.static_range(C):
                # every episode's first program would write the same
                tl.store(d_obs_entropy + c, scale * share[c], mask=b == 0)
    # 0 in cells that do not count, and with it every gradient there
    per_cell = tl.where(valid, scale * tl.load(coef + 2 * b), 0.0)
    cost = tl.where(
        valid, kappa * (scale * tl.load(coef + 2 * b + 1) * number(annealed, W_CE, w_ce, ANNEALED, ACC)), 0.0
    )
    if HARD_CELL:
        right = tl.load(predicted + b * P + cell, mask=cell_in, other=0).to(tl.int64) == label
        cost = tl.where(right, cost * number(annealed, FLOOR, hard_floor, ANNEALED, ACC), cost)

    plan_stride = unpacked(plan_stride)
    plan = cells(plan + b * plan_stride[0], plan_stride[3], plan_stride[4], cell, W, FLAT)
    if D_PLAN:
        d_plan_stride = unpacked(d_plan_stride)
        d_plan = cells(d_plan + b * d_plan_stride[0], d_plan_stride[3], d_plan_stride[4], cell, W, FLAT)
    if AGREEMENT:
        back_stride = unpacked(back_stride)
        back = cells(back + b * back_stride[0], back_stride[3], back_stride[4], cell, W, FLAT)
    if D_BACK:
        d_back_stride = unpacked(d_back_stride)
        d_back = cells(d_back + b * d_back_stride[0], d_back_stride[3], d_back_stride[4], cell, W, FLAT)
    if RISK or ANCHOR:
        p, log_p = preferred(preference, preference_stride, b, cell, W, valid, C, FLAT, ACC, FAST)
    # logarithms are in base 2, but that of the preference
    risk = per_cell * number(annealed, W_RISK, w_risk, ANNEALED, ACC)
    risk_2 = LN_2 * risk
    agreement_2 = 0.5 * LN_2 * per_cell * number(annealed, W_AGREEMENT, w_agreement, ANNEALED, ACC)
    mass = ()
    for _c in tl.static_range(C):
        mass = mass + (tl.zeros([BLOCK_P], ACC),)

    for t in range(0, T):
        # all that a step reads is asked for before anything waits for it: no load passes a store that comes before it
        if AGREEMENT:
            y = load_classes(back, back_stride[2], valid, C, ACC)
        if D_PLAN:
            step = (t == T - 1).to(ACC)
            if STEP_WEIGHT:
                step = tl.load(step_weight + t).to(ACC)
        if D_PLAN and PROMPT:
            pooled = load_classes(d_pooled + (b * T + t) * C, 1, True, C, ACC)
        if AMBIGUITY:
            h = load_classes(obs_entropy, 1, True, C, ACC)
        x = load_classes(plan, plan_stride[2], valid, C, ACC)
        x_max, z, q, x_log2 = softmax(x, C, ACC, FAST)
        if RISK:
            total = ()
            for c in tl.static_range(C):
                total = total + (mass[c] + q[c],)
            mass = total
        if AGREEMENT:
            y_max, y_z, r, y_log2 = softmax(y, C, ACC, FAST)
            psi = ()
            mean = tl.zeros([BLOCK_P], ACC)
        phi = ()
        shift = tl.zeros([BLOCK_P], ACC)
        for c in tl.static_range(C):
            potential = tl.zeros([BLOCK_P], ACC)
            if RISK:
                potential += tl.where(q[c] == 0, 0.0, risk_2 * z[c] - risk * log_p[c])
            if AMBIGUITY:
                potential += per_cell * number(annealed, W_AMBIGUITY, w_ambiguity, ANNEALED, ACC) * h[c]
            if AGREEMENT:
                log_sum = log2(tl.maximum(q[c] + r[c], TINY), FAST)
                potential += agreement_2 * (z[c] - log_sum)
                psi = psi + (agreement_2 * (y_z[c] - log_sum),)
                mean += r[c] * psi[c]
            phi = phi + (potential,)
            shift += q[c] * phi[c]
        if D_BACK:
            to = d_back
            for c in tl.static_range(C):
                tl.store(to, r[c] * (psi[c] - mean), mask=cell_in)
                to += d_back_stride[2]
            d_back += d_back_stride[1]
        if D_PLAN:
            k = cost * step
            to = d_plan
            for c in tl.static_range(C):
                d = q[c] * (phi[c] - shift + k) - tl.where(label == c, k, 0.0)
                if PROMPT:
                    d += tl.where(valid & (x[c] != -float("inf")), scale * pooled[c], 0.0)
                tl.store(to, d, mask=cell_in)
                to += d_plan_stride[2]
            d_plan += d_plan_stride[1]
        plan += plan_stride[1]
        if AGREEMENT:
            back += back_stride[1]

    if D_PREFERENCE:
        if ANCHOR:
            anchor_stride = unpacked(anchor_stride)
            anchor = cells(anchor, anchor_stride[1], anchor_stride[2], cell, W, FLAT)
            log_a = load_classes(anchor, anchor_stride[0], valid, C, ACC)
            phi = ()
            mean = tl.zeros([BLOCK_P], ACC)
            for c in tl.static_range(C):
                phi = phi + (tl.where(p[c] == 0, 0.0, log_p[c] - log_a[c]),)
                mean += p[c] * phi[c]
        d_preference_stride = unpacked(d_preference_stride)
        d_preference = cells(
            d_preference + b * d_preference_stride[0], d_preference_stride[2], d_preference_stride[3], cell, W, FLAT
        )
        for c in tl.static_range(C):
            d = tl.zeros([BLOCK_P], ACC)
            if RISK:
                d += risk * (p[c] * T - mass[c])
            if ANCHOR:
                d += per_cell * number(annealed, W_ANCHOR, w_anchor, ANNEALED, ACC) * (p[c] * (phi[c] - mean))
            tl.store(d_preference, d, mask=cell_in)
            d_preference += d_preference_stride[1]
