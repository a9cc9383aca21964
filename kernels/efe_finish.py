"""The finishing pass of the Triton loss: from the tiles' slots to terms, loss and the gradients of what is small."""

import triton
import triton.language as tl

from . import reference
from .efe_tile import (
    AGREEMENT_SUM,
    ANCHOR_SUM,
    BAD,
    CE,
    CELLS,
    FLOOR,
    HARD,
    HEAD,
    KAPPA,
    POOL,
    RISK_SUM,
    W_AGREEMENT,
    W_AMBIGUITY,
    W_ANCHOR,
    W_CE,
    W_PROMPT,
    W_RISK,
    number,
)

# a norm under this counts as this, as in F.cosine_similarity
EPS = tl.constexpr(1.0e-8)
# where each is told of an episode
COLUMNS = tl.constexpr(len(reference.COLUMNS))
CE_COLUMN = tl.constexpr(reference.COLUMNS.index("ce"))
RISK_COLUMN = tl.constexpr(reference.COLUMNS.index("risk"))
AMBIGUITY_COLUMN = tl.constexpr(reference.COLUMNS.index("ambiguity"))
AGREEMENT_COLUMN = tl.constexpr(reference.COLUMNS.index("agreement"))
ANCHOR_COLUMN = tl.constexpr(reference.COLUMNS.index("anchor"))
PROMPT_COLUMN = tl.constexpr(reference.COLUMNS.index("prompt"))
HARD_COLUMN = tl.constexpr(reference.COLUMNS.index("hard"))
ACCURACY_COLUMN = tl.constexpr(reference.COLUMNS.index("accuracy"))


@triton.jit
def _sum_tiles(row, live, tiles, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of one slot over the tiles that have a cell that counts, in a fixed order."""
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        there = tile < tiles
        there = there & (tl.load(live + tile, mask=there, other=0.0) > 0)
        total += tl.load(row + tile, mask=there, other=0.0)
    return tl.sum(total)


@triton.jit
def _sum_classes(rows, live, tiles, C, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """The same for C slots that follow each other -> [BLOCK_C]."""
    total = tl.zeros([BLOCK_C, BLOCK], ACC)
    c = tl.arange(0, BLOCK_C)[:, None]
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)[None, :]
        there = tile < tiles
        there = there & (tl.load(live + tile, mask=there, other=0.0) > 0)
        total += tl.load(rows + c * tiles + tile, mask=there & (c < C), other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _not_negative(divergence):
    """0 where rounding made it negative."""
    return tl.where(divergence < 0, 0.0, divergence)


@triton.jit
def _scaled(x, ACC: tl.constexpr):
    """x over its largest element, so that no square overflows; that; the norm of the quotient, and held at EPS."""
    largest = tl.max(tl.abs(x))
    largest = tl.where(largest > 0, largest, 1.0)
    x = x / largest
    norm = tl.sqrt(tl.sum(x * x))
    # in the accumulating type: tl.maximum would take the constant through float32
    return x, largest, norm, tl.maximum(norm, tl.full([], EPS, ACC) / largest)


@triton.jit(do_not_specialize=["B", "T", "tiles"])
def efe_finish_kernel(
    slots,  # [B, K, tiles]
    arrived,  # [1] 0 at the start
    totals,  # [B, 2 + C] loss of the episode, 1 where it counts, gradient of obs_entropy
    obs_entropy,
    prompt_colors,
    annealed,  # [7]
    prompt_stride,  # b, c
    obs_stride,
    loss,
    terms,  # [B, 8]
    solved,  # [B]
    coef,  # [B + 1, 2]
    d_pooled,  # [B, T, C]
    d_obs_entropy,  # [C]
    d_prompt_colors,  # [B, C]
    hard_floor: tl.float64,
    w_ce: tl.float64,
    w_risk: tl.float64,
    w_ambiguity: tl.float64,
    w_agreement: tl.float64,
    w_anchor: tl.float64,
    w_prompt: tl.float64,
    B,
    T,
    tiles,
    C: tl.constexpr,
    RISK: tl.constexpr,
    AMBIGUITY: tl.constexpr,
    AGREEMENT: tl.constexpr,
    ANCHOR: tl.constexpr,
    PROMPT: tl.constexpr,
    USE_CE: tl.constexpr,
    HARD_EPISODE: tl.constexpr,
    ANNEALED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    EPSILON: tl.constexpr = 2.0**-52 if ACC.is_fp64() else 2.0**-23
    b = tl.program_id(0).to(tl.int64)
    row = slots + b * (HEAD + T * C * (PROMPT + AMBIGUITY)) * tiles
    live = row + CELLS * tiles
    c = tl.arange(0, BLOCK_C)
    class_in = c < C
    cells = _sum_tiles(live, live, tiles, ACC, BLOCK)
    wrong = _sum_tiles(row + HARD * tiles, live, tiles, ACC, BLOCK)
    bad = _sum_tiles(row + BAD * tiles, live, tiles, ACC, BLOCK)
    kappa = _sum_tiles(row + KAPPA * tiles, live, tiles, ACC, BLOCK)
    n = tl.maximum(cells, 1.0)
    ratio = wrong / n
    sigma = tl.full([], 1.0, ACC)
    if HARD_EPISODE:
        floor = number(annealed, FLOOR, hard_floor, ANNEALED, ACC)
        sigma = floor + (1.0 - floor) * ratio
    # a class that does not exist must show: nothing here can raise
    sigma = tl.where(bad > 0, float("nan"), sigma)
    sigma = tl.where(cells > 0, sigma, 0.0)

    per_kappa = tl.where(kappa == 0, 0.0, 1.0 / tl.where(kappa == 0, 1.0, kappa))
    out = terms + b * COLUMNS
    ce = _sum_tiles(row + CE * tiles, live, tiles, ACC, BLOCK) * per_kappa
    total = tl.zeros([], ACC)
    if USE_CE:
        total += number(annealed, W_CE, w_ce, ANNEALED, ACC) * ce
    tl.store(out + CE_COLUMN, ce)
    risk = tl.zeros([], ACC)
    if RISK:
        risk = _not_negative(_sum_tiles(row + RISK_SUM * tiles, live, tiles, ACC, BLOCK) / n)
        total += number(annealed, W_RISK, w_risk, ANNEALED, ACC) * risk
    tl.store(out + RISK_COLUMN, risk)
    agreement = tl.zeros([], ACC)
    if AGREEMENT:
        agreement = _not_negative(_sum_tiles(row + AGREEMENT_SUM * tiles, live, tiles, ACC, BLOCK) / n)
        total += number(annealed, W_AGREEMENT, w_agreement, ANNEALED, ACC) * agreement
    tl.store(out + AGREEMENT_COLUMN, agreement)
    anchor = tl.zeros([], ACC)
    if ANCHOR:
        anchor = _sum_tiles(row + ANCHOR_SUM * tiles, live, tiles, ACC, BLOCK) / n
        # by rounding alone: an anchor need not add up to 1
        anchor = tl.where(anchor > -16 * EPSILON, _not_negative(anchor), anchor)
        total += number(annealed, W_ANCHOR, w_anchor, ANNEALED, ACC) * anchor
    tl.store(out + ANCHOR_COLUMN, anchor)

    rows = row + HEAD * tiles
    prompt = tl.zeros([], ACC)
    if PROMPT:
        v = tl.load(prompt_colors + b * prompt_stride[0] + c * prompt_stride[1], mask=class_in, other=0.0)
        v = tl.where(cells > 0, v.to(ACC), 0.0)
        v, v_largest, v_norm, v_held = _scaled(v, ACC)
        dv = tl.zeros([BLOCK_C], ACC)
        scale = tl.where(cells > 0, -sigma * number(annealed, W_PROMPT, w_prompt, ANNEALED, ACC) / T, 0.0)
        for t in range(0, T):
            u = _sum_classes(rows, live, tiles, C, ACC, BLOCK, BLOCK_C) / n * (1.0 / POOL)
            u, u_largest, u_norm, u_held = _scaled(u, ACC)
            cos = tl.sum((u / u_held) * (v / v_held))
            prompt -= cos / T
            du = v / v_held - tl.where(u_norm < u_held, 0.0, cos) * (u / u_held)
            dv += u / u_held - tl.where(v_norm < v_held, 0.0, cos) * (v / v_held)
            tl.store(d_pooled + (b * T + t) * C + c, scale / n * (du / u_held / u_largest), mask=class_in)
            # step by step: all of them may lie further than an int32 says
            rows += C * tiles
        tl.store(d_prompt_colors + b * C + c, scale * (dv / v_held / v_largest), mask=class_in)
        total += number(annealed, W_PROMPT, w_prompt, ANNEALED, ACC) * prompt
    tl.store(out + PROMPT_COLUMN, prompt)
    ambiguity = tl.zeros([], ACC)
    if AMBIGUITY:
        mass = tl.zeros([BLOCK_C], ACC)
        for _t in range(0, T):
            mass += _sum_classes(rows, live, tiles, C, ACC, BLOCK, BLOCK_C)
            rows += C * tiles
        h = tl.load(obs_entropy + c * obs_stride, mask=class_in, other=0.0).to(ACC)
        ambiguity = tl.sum(mass * h) / n
        w = number(annealed, W_AMBIGUITY, w_ambiguity, ANNEALED, ACC)
        total += w * ambiguity
        tl.store(totals + b * (2 + C) + 2 + c, sigma * w / n * mass, mask=class_in)
    tl.store(out + AMBIGUITY_COLUMN, ambiguity)
    tl.store(out + HARD_COLUMN, ratio)
    tl.store(out + ACCURACY_COLUMN, (cells - wrong) / n)
    tl.store(solved + b, (cells > 0) & (wrong == 0))
    tl.store(coef + 2 * b, sigma / n)
    tl.store(coef + 2 * b + 1, sigma * per_kappa)
    tl.store(totals + b * (2 + C), tl.where(cells > 0, sigma * total, 0.0))
    tl.store(totals + b * (2 + C) + 1, (cells > 0).to(ACC))

    # every write above by every thread of this program comes before its arrival
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == B - 1:
        loss_sum = tl.zeros([BLOCK_B], ACC)
        episode_sum = tl.zeros([BLOCK_B], ACC)
        for start in range(0, B, BLOCK_B):
            e = start + tl.arange(0, BLOCK_B)
            # past the caches: other programs wrote these
            loss_sum += tl.load(totals + e * (2 + C), mask=e < B, other=0.0, cache_modifier=".cg")
            episode_sum += tl.load(totals + e * (2 + C) + 1, mask=e < B, other=0.0, cache_modifier=".cg")
        share = 1.0 / tl.maximum(tl.sum(episode_sum), 1.0)
        tl.store(loss, tl.sum(loss_sum) * share)
        tl.store(coef + 2 * B, share)
        tl.store(coef + 2 * B + 1, 0.0)
        if AMBIGUITY:
            dh = tl.zeros([BLOCK_C, BLOCK_B], ACC)
            for start in range(0, B, BLOCK_B):
                e = start + tl.arange(0, BLOCK_B)[None, :]
                at = totals + e * (2 + C) + 2 + c[:, None]
                dh += tl.load(at, mask=(e < B) & (c[:, None] < C), other=0.0, cache_modifier=".cg")
            tl.store(d_obs_entropy + c, tl.sum(dh, axis=1), mask=class_in)
