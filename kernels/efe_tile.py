"""What the Triton kernels of the expected-free-energy loss share: slots, cells, softmax over a tuple of classes.

Formulas and edge rules are those of `reference.py`. Axes: B episodes, T plan steps, C classes, P cells of a canvas.
One program is a tile of BLOCK_P cells of one episode. A cell is a lane and its classes are a tuple of vectors, so
that every reduction over classes stays in a thread's own registers.

Forward of a tile writes the sums over its cells into slots of its own, [B, tiles, K], where K is the head below, then
pooled logits [T, C] and probability mass [T, C] where those terms are on. float64 accumulates in float64, all else
in float32.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from . import reference

CELLS = tl.constexpr(0)
HARD = tl.constexpr(1)
BAD = tl.constexpr(2)
KAPPA = tl.constexpr(3)
CE = tl.constexpr(4)
RISK_SUM = tl.constexpr(5)
AGREEMENT_SUM = tl.constexpr(6)
ANCHOR_SUM = tl.constexpr(7)
HEAD = tl.constexpr(8)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# under every sum of two probabilities that is not multiplied by 0, and a normal float32
TINY = tl.constexpr(1.0e-37)

# logits are pooled in this scale, so that the sum of the largest numbers there are is one
POOL = tl.constexpr(2.0**-20)

IGNORED_PREDICTION = tl.constexpr(reference.IGNORED_PREDICTION)


# places of the numbers that may be annealed
W_CE = tl.constexpr(reference.TERMS.index("ce"))
W_RISK = tl.constexpr(reference.TERMS.index("risk"))
W_AMBIGUITY = tl.constexpr(reference.TERMS.index("ambiguity"))
W_AGREEMENT = tl.constexpr(reference.TERMS.index("agreement"))
W_ANCHOR = tl.constexpr(reference.TERMS.index("anchor"))
W_PROMPT = tl.constexpr(reference.TERMS.index("prompt"))
FLOOR = tl.constexpr(len(reference.TERMS))


@triton.jit
def unpacked(packed):
    """Strides of what `launcher.Kernel` hands over."""
    strides = ()
    for i in tl.static_range(len(packed)):
        strides = strides + (packed[i] >> 2,)
    return strides


@triton.jit
def cells(ptr, stride_h, stride_w, cell, W, FLAT: tl.constexpr):
    """Pointers to the cells of a canvas: one multiplication where its rows follow each other without a gap."""
    if FLAT:
        return ptr + cell * stride_w
    return ptr + (cell // W) * stride_h + (cell % W) * stride_w


@triton.jit
def load_classes(ptr, stride_c, mask, C: tl.constexpr, ACC: tl.constexpr):
    """Tuple of the C values of each lane; masked lanes read 0."""
    x = ()
    for _c in tl.static_range(C):
        x = x + (tl.load(ptr, mask=mask, other=0.0).to(ACC),)
        ptr += stride_c
    return x


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Base-2 logarithm; FAST is one instruction for float32, with an absolute error of 2^-22."""
    if FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def softmax(x, C: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr):
    """From a tuple of logits: their maximum, tuples (x - max) / ln 2 and p, and log2 of sum exp (x - max).

    The differences are held above the least exponent, so that p log p is 0 where p is: log2 p is what comes back
    less the last. All is in base 2, which is what the hardware computes; a NaN goes through everything.
    """
    least: tl.constexpr = -160.0 if ACC.is_fp32() else -1100.0
    largest = x[0]
    for c in tl.static_range(1, C):
        largest = tl.maximum(largest, x[c])
    z = ()
    e = ()
    total = tl.zeros_like(largest)
    for c in tl.static_range(C):
        z = z + (tl.maximum((x[c] - largest) * LOG2_E, least, propagate_nan=tl.PropagateNan.ALL),)
        e = e + (tl.exp2(z[c]),)
        total += e[c]
    inverse = 1.0 / total
    p = ()
    for c in tl.static_range(C):
        p = p + (e[c] * inverse,)
    return largest, z, p, log2(total, FAST)


@triton.jit
def labels(ptr, cell_in, ignore_index, class_weight, C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """Masks of the cells that count, and of those whose class exists; class or -1; class weight or 0."""
    label = tl.load(ptr, mask=cell_in, other=0).to(tl.int64)
    valid = cell_in & (label != ignore_index)
    known = valid & (label >= 0) & (label < C)
    label = tl.where(known, label, -1)
    kappa = known.to(ACC)
    if CLASS_WEIGHT:
        kappa = tl.load(class_weight + label, mask=known, other=0.0).to(ACC)
    return valid, known, label, kappa


@triton.jit
def number(annealed, place: tl.constexpr, given, ANNEALED: tl.constexpr, ACC: tl.constexpr):
    """A weight, or the floor behind them: from memory where it is annealed, so that no graph holds its value."""
    if ANNEALED:
        return tl.load(annealed + place).to(ACC)
    return tl.full([], given, ACC)


@triton.jit
def tile_of_cells(
    target,
    target_stride,
    ignore_index,
    class_weight,
    tiles,
    P,
    W,
    C: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr,
    FLAT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What both passes begin with: a program's episode, tile and cells, which of them exist, and their labels."""
    # in one dimension: the others hold 65,535 programs at most, and there may be more episodes
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    cell = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    cell_in = cell < P
    target_stride = unpacked(target_stride)
    target = cells(target + b * target_stride[0], target_stride[1], target_stride[2], cell, W, FLAT)
    valid, known, label, kappa = labels(target, cell_in, ignore_index, class_weight, C, CLASS_WEIGHT, ACC)
    return b, tile, cell, cell_in, valid, known, label, kappa


@triton.jit
def preferred(
    preference, stride, b, cell, W, valid, C: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr
):
    """Tuples p and log p of the preference, -inf where it forbids: that costs infinitely much.

    In nats: the largest numbers there are, times log2(e), would be infinite.
    """
    stride = unpacked(stride)
    preference = cells(preference + b * stride[0], stride[2], stride[3], cell, W, FLAT)
    y = load_classes(preference, stride[1], valid, C, ACC)
    y_max, y_z, p, y_log2 = softmax(y, C, ACC, FAST)
    log_p = ()
    for c in tl.static_range(C):
        log_p = log_p + (y[c] - y_max - LN_2 * y_log2,)
    return p, log_p
