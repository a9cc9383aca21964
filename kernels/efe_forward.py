"""The forward pass over the tiles: sums of every term over a tile's cells, and what each cell predicts."""

import triton.language as tl

from .efe_tile import (
    AGREEMENT_SUM,
    ANCHOR_SUM,
    BAD,
    CE,
    CELLS,
    FLOOR,
    HARD,
    HEAD,
    IGNORED_PREDICTION,
    KAPPA,
    LN_2,
    POOL,
    RISK_SUM,
    TINY,
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
def efe_forward_kernel(
    plan,
    target,
    back,
    preference,
    anchor,
    step_weight,
    class_weight,
    annealed,  # [7]
    predicted,  # [B, P]
    slots,  # [B, tiles, K]
    arrived,  # [1]
    plan_stride,  # b, t, c, h, w
    target_stride,  # b, h, w
    back_stride,  # b, t, c, h, w
    preference_stride,  # b, c, h, w
    anchor_stride,  # c, h, w
    ignore_index: tl.int64,
    hard_floor: tl.float64,
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
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, tile, cell, cell_in, valid, known, label, kappa = tile_of_cells(
        target, target_stride, ignore_index, class_weight, tiles, P, W, C, CLASS_WEIGHT, FLAT, ACC, BLOCK_P
    )
    count = tl.sum(valid.to(ACC))
    if (tile == 0) & (b == 0):
        tl.store(arrived, 0)
    slots += (b * tiles + tile) * (HEAD + tl.cast(T, tl.int64) * (C * (PROMPT + AMBIGUITY)))

    plan_stride = unpacked(plan_stride)
    plan = cells(plan + b * plan_stride[0], plan_stride[3], plan_stride[4], cell, W, FLAT)
    if AGREEMENT:
        back_stride = unpacked(back_stride)
        back = cells(back + b * back_stride[0], back_stride[3], back_stride[4], cell, W, FLAT)
    anchor_sum = tl.zeros([BLOCK_P], ACC)
    if RISK or ANCHOR:
        p, log_p = preferred(preference, preference_stride, b, cell, W, valid, C, FLAT, ACC, FAST)
    if ANCHOR:
        anchor_stride = unpacked(anchor_stride)
        anchor = cells(anchor, anchor_stride[1], anchor_stride[2], cell, W, FLAT)
        log_a = load_classes(anchor, anchor_stride[0], valid, C, ACC)
        for c in tl.static_range(C):
            anchor_sum += tl.where(p[c] == 0, 0.0, p[c] * (log_p[c] - log_a[c]))

    nll = tl.zeros([BLOCK_P], ACC)
    risk = tl.zeros([BLOCK_P], ACC)
    agreement = tl.zeros([BLOCK_P], ACC)
    best = tl.zeros([BLOCK_P], tl.int32)
    first = 0
    if not (RISK or AMBIGUITY or AGREEMENT or PROMPT or STEP_WEIGHT):
        first = T - 1
        plan += tl.cast(first, tl.int64) * plan_stride[1]
    # a tile without a cell that counts reads nothing, and leaves zeros
    if PROMPT or AMBIGUITY:
        tail = tl.where(count > 0, 0, T * (C * (PROMPT + AMBIGUITY)))
        for start in range(0, tail, BLOCK_P):
            at = start + tl.arange(0, BLOCK_P)
            tl.store(slots + HEAD + at, tl.zeros([BLOCK_P], ACC), mask=at < tail)
    for t in range(first, tl.where(count > 0, T, 0)):
        x = load_classes(plan, plan_stride[2], valid, C, ACC)
        at_label = tl.load(plan + label * plan_stride[2], mask=known, other=0.0).to(ACC)
        if AGREEMENT:
            # asked for here: behind the stores of this step it would be a second trip to memory
            y = load_classes(back, back_stride[2], valid, C, ACC)
        step = (t == T - 1).to(ACC)
        if STEP_WEIGHT:
            step = tl.load(step_weight + t).to(ACC)
        x_max, z, q, x_log2 = softmax(x, C, ACC, FAST)
        nll += tl.where(step != 0, step * (x_max - at_label + LN_2 * x_log2), 0.0)
        if t == T - 1:
            # the first of the largest: going down, it is what was written last
            for c in tl.static_range(C - 1, -1, -1):
                best = tl.where(x[c] == x_max, c, best)
        if RISK or AGREEMENT:
            # sum q log2 q, as the probabilities add up to 1
            neg_entropy = -x_log2
            for c in tl.static_range(C):
                neg_entropy += q[c] * z[c]
        if RISK:
            risk += LN_2 * neg_entropy
            for c in tl.static_range(C):
                risk -= q[c] * tl.where(q[c] == 0, 0.0, log_p[c])
        row = slots + HEAD + t * C
        if PROMPT:
            for c in tl.static_range(C):
                # cells that do not count read 0
                tl.store(row + c, tl.sum(tl.where(x[c] == -float("inf"), 0.0, x[c] * POOL)))
            row += T * C
        if AMBIGUITY:
            for c in tl.static_range(C):
                tl.store(row + c, tl.sum(tl.where(valid, q[c], 0.0)))
        if AGREEMENT:
            y_max, y_z, r, y_log2 = softmax(y, C, ACC, FAST)
            # twice the divergence: with s = q + r, sum q log2 q + sum r log2 r - sum s (log2 s - 1), and sum s = 2
            divergence = neg_entropy - y_log2 + 2.0
            for c in tl.static_range(C):
                total = q[c] + r[c]
                divergence += r[c] * y_z[c] - total * log2(tl.maximum(total, TINY), FAST)
            agreement += divergence
            back += back_stride[1]
        plan += plan_stride[1]

    hard = valid & (best != label)
    cost = kappa
    if HARD_CELL:
        cost = tl.where(hard, kappa, kappa * number(annealed, FLOOR, hard_floor, ANNEALED, ACC))
    tl.store(slots + CELLS, count)
    tl.store(slots + HARD, tl.sum(hard.to(ACC)))
    tl.store(slots + BAD, tl.sum((valid & (label < 0)).to(ACC)))
    tl.store(slots + KAPPA, tl.sum(kappa))
    tl.store(slots + CE, tl.sum(tl.where(cost == 0, 0.0, cost * nll)))
    tl.store(slots + RISK_SUM, tl.sum(tl.where(valid, risk, 0.0)))
    tl.store(slots + AGREEMENT_SUM, tl.sum(tl.where(valid, 0.5 * LN_2 * agreement, 0.0)))
    tl.store(slots + ANCHOR_SUM, tl.sum(tl.where(valid, anchor_sum, 0.0)))
    tl.store(predicted + b * P + cell, tl.where(valid, best, IGNORED_PREDICTION).to(tl.uint8), mask=cell_in)
