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
    unpacked,
)
from .launcher import jit_unspecialized

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
def _sum_tiles(row, column, there, K, tiles, R: tl.constexpr, S: tl.constexpr, ONE, ACC, BLOCK: tl.constexpr):
    """Sums [R, S] of slots over the tiles, in a fixed order; all of a block's loads are under way at once.

    Slots of a tile lie side by side, and so do lanes: each adds its own slots, and where a program is one warp hardly
    a number has to change lanes.
    """
    total = tl.zeros([BLOCK, R, S], ACC)
    for start in range(0, BLOCK if ONE else tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)[:, None, None]
        at = row + (tile.to(tl.int64) * K + column[None, :, :])
        total += tl.load(at, mask=(tile < tiles) & there[None, :, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _slot(head, place: tl.constexpr):
    """One number of a tile's head [1, HEAD]."""
    return tl.sum(tl.where(tl.arange(0, HEAD)[None, :] == place, head, 0.0))


@triton.jit
def _not_negative(divergence):
    """0 where rounding made it negative."""
    return tl.where(divergence < 0, 0.0, divergence)


@triton.jit
def _scaled(x, ACC: tl.constexpr):
    """Rows of x over their largest element, so that no square overflows; that; the quotient's norm; held at EPS."""
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(largest > 0, largest, 1.0)
    x = x / largest[:, None]
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    # in the accumulating type: tl.maximum would take the constant through float32
    return x, largest, norm, tl.maximum(norm, tl.full([], EPS, ACC) / largest)


# what the launcher allocates
OWN = (
    "slots", "arrived", "totals", "loss", "terms", "solved", "coef", "d_pooled", "d_obs_entropy", "d_prompt_colors",
)  # fmt: skip


@jit_unspecialized(*OWN)
def efe_finish_kernel(
    slots,  # [B, tiles, K]
    arrived,  # [1] 0 at the start
    totals,  # [B, 2 + C] loss of the episode, 1 where it counts, gradient of obs_entropy
    obs_entropy,
    prompt_colors,
    annealed,  # [7]
    loss,
    terms,  # [B, 8]
    solved,  # [B]
    coef,  # [B + 1, 2]
    d_pooled,  # [B, T, C]
    d_obs_entropy,  # [C]
    d_prompt_colors,  # [B, C]
    prompt_stride,  # b, c
    obs_stride,  # c
    hard_floor: tl.float64,
    w_ce: tl.float64,
    w_risk: tl.float64,
    w_ambiguity: tl.float64,
    w_agreement: tl.float64,
    w_anchor: tl.float64,
    w_prompt: tl.float64,
    B: tl.int32,
    T: tl.int32,
    tiles: tl.int32,
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
    ONE: tl.constexpr,  # the tiles are one block
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    EPSILON: tl.constexpr = 2.0**-52 if ACC.is_fp64() else 2.0**-23
    b = tl.program_id(0).to(tl.int64)
    K = HEAD + tl.cast(T, tl.int64) * (C * (PROMPT + AMBIGUITY))
    row = slots + b * tiles * K
    c = tl.arange(0, BLOCK_C)[None, :]
    class_in = c < C
    if PROMPT:
        # asked for before anything is waited for
        prompt_stride = unpacked(prompt_stride)
        v = tl.load(prompt_colors + b * prompt_stride[0] + c * prompt_stride[1], mask=class_in, other=0.0).to(ACC)
    if AMBIGUITY:
        obs_stride = unpacked(obs_stride)
        h = tl.load(obs_entropy + c * obs_stride[0], mask=class_in, other=0.0).to(ACC)

    place = tl.arange(0, HEAD)[None, :]
    head = _sum_tiles(row, place, place >= 0, K, tiles, 1, HEAD, ONE, ACC, BLOCK)
    cells = _slot(head, CELLS)
    wrong = _slot(head, HARD)
    kappa = _slot(head, KAPPA)
    n = tl.maximum(cells, 1.0)
    ratio = wrong / n
    sigma = tl.full([], 1.0, ACC)
    if HARD_EPISODE:
        floor = number(annealed, FLOOR, hard_floor, ANNEALED, ACC)
        sigma = floor + (1.0 - floor) * ratio
    # a class that does not exist must show: nothing here can raise
    sigma = tl.where(_slot(head, BAD) > 0, float("nan"), sigma)
    sigma = tl.where(cells > 0, sigma, 0.0)

    per_kappa = tl.where(kappa == 0, 0.0, 1.0 / tl.where(kappa == 0, 1.0, kappa))
    out = terms + b * COLUMNS
    ce = _slot(head, CE) * per_kappa
    total = tl.zeros([], ACC)
    if USE_CE:
        total += number(annealed, W_CE, w_ce, ANNEALED, ACC) * ce
    tl.store(out + CE_COLUMN, ce)
    risk = tl.zeros([], ACC)
    if RISK:
        risk = _not_negative(_slot(head, RISK_SUM) / n)
        total += number(annealed, W_RISK, w_risk, ANNEALED, ACC) * risk
    tl.store(out + RISK_COLUMN, risk)
    agreement = tl.zeros([], ACC)
    if AGREEMENT:
        agreement = _not_negative(_slot(head, AGREEMENT_SUM) / n)
        total += number(annealed, W_AGREEMENT, w_agreement, ANNEALED, ACC) * agreement
    tl.store(out + AGREEMENT_COLUMN, agreement)
    anchor = tl.zeros([], ACC)
    if ANCHOR:
        anchor = _slot(head, ANCHOR_SUM) / n
        # by rounding alone: an anchor need not add up to 1
        anchor = tl.where(anchor > -16 * EPSILON, _not_negative(anchor), anchor)
        total += number(annealed, W_ANCHOR, w_anchor, ANNEALED, ACC) * anchor
    tl.store(out + ANCHOR_COLUMN, anchor)

    steps = tl.arange(0, BLOCK_T)[:, None]
    rows = row + HEAD
    prompt = tl.zeros([], ACC)
    if PROMPT:
        v = tl.where(cells > 0, v, 0.0)
        v, v_largest, v_norm, v_held = _scaled(v, ACC)
        dv = tl.zeros([1, BLOCK_C], ACC)
        scale = tl.where(cells > 0, -sigma * number(annealed, W_PROMPT, w_prompt, ANNEALED, ACC) / T, 0.0)
        for first in range(0, T, BLOCK_T):
            t = (first + steps).to(tl.int64)
            there = (t < T) & class_in
            # rows that do not exist are 0, and add nothing
            u = _sum_tiles(rows, t * C + c, there, K, tiles, BLOCK_T, BLOCK_C, ONE, ACC, BLOCK) / n * (1.0 / POOL)
            u, u_largest, u_norm, u_held = _scaled(u, ACC)
            u_unit = u / u_held[:, None]
            v_unit = v / v_held[:, None]
            cos = tl.sum(u_unit * v_unit, axis=1)
            prompt -= tl.sum(cos) / T
            du = v_unit - tl.where(u_norm < u_held, 0.0, cos)[:, None] * u_unit
            dv += tl.sum(u_unit - tl.where(v_norm < v_held, 0.0, cos)[:, None] * v_unit, axis=0)[None, :]
            tl.store(
                d_pooled + b * T * C + t * C + c, scale / n * (du / u_held[:, None] / u_largest[:, None]), mask=there
            )
        dv = dv / v_held[:, None] / v_largest[:, None]
        tl.store(d_prompt_colors + b * C + c, scale * dv, mask=class_in)
        total += number(annealed, W_PROMPT, w_prompt, ANNEALED, ACC) * prompt
        rows += T * C
    tl.store(out + PROMPT_COLUMN, prompt)
    ambiguity = tl.zeros([], ACC)
    if AMBIGUITY:
        mass = tl.zeros([BLOCK_T, BLOCK_C], ACC)
        for first in range(0, T, BLOCK_T):
            t = (first + steps).to(tl.int64)
            mass += _sum_tiles(rows, t * C + c, (t < T) & class_in, K, tiles, BLOCK_T, BLOCK_C, ONE, ACC, BLOCK)
        mass = tl.sum(mass, axis=0)[None, :]
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
        # of each episode its loss and whether it counts, then the gradient of obs_entropy
        columns: tl.constexpr = 2 + C if AMBIGUITY else 2
        width: tl.constexpr = 2 * BLOCK_C if AMBIGUITY else 2
        column = tl.arange(0, width)[None, :]
        sums = tl.zeros([BLOCK_B, width], ACC)
        for start in range(0, B, BLOCK_B):
            e = (start + tl.arange(0, BLOCK_B)[:, None]).to(tl.int64)
            at = totals + e * (2 + C) + column
            # past the caches: other programs wrote these
            sums += tl.load(at, mask=(e < B) & (column < columns), other=0.0, cache_modifier=".cg")
        sums = tl.sum(sums, axis=0)[None, :]
        loss_sum = tl.sum(tl.where(column == 0, sums, 0.0))
        episodes = tl.sum(tl.where(column == 1, sums, 0.0))
        share = 1.0 / tl.maximum(episodes, 1.0)
        tl.store(loss, loss_sum * share)
        tl.store(coef + 2 * B, share)
        tl.store(coef + 2 * B + 1, 0.0)
        if AMBIGUITY:
            tl.store(d_obs_entropy + column - 2, sums, mask=(column >= 2) & (column < columns))
