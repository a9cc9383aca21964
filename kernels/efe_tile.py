"""What the Triton kernels of the expected-free-energy loss share: slots, cells, softmax over a tuple of classes.

Formulas and edge rules are those of `reference.py`. Axes: B episodes, T plan steps, C classes, P cells of a canvas.
One program is a tile of BLOCK_P cells of one episode. A cell is a lane and its classes are a tuple of vectors, so
that every reduction over classes stays in a thread's own registers.

Forward of a tile writes the sums over its cells into slots of its own, [B, K, tiles], where K is the head below, then
pooled logits [T, C] and probability mass [T, C] where those terms are on. float64 accumulates in float64, all else
in float32.
"""

import triton
import triton.language as tl

CELLS = tl.constexpr(0)
HARD = tl.constexpr(1)
BAD = tl.constexpr(2)
KAPPA = tl.constexpr(3)
CE = tl.constexpr(4)
RISK_SUM = tl.constexpr(5)
AGREEMENT_SUM = tl.constexpr(6)
ANCHOR_SUM = tl.constexpr(7)
HEAD = tl.constexpr(8)

# stands for log 0 where it is multiplied by 0
LOG_ZERO = tl.constexpr(-1.0e30)
# under every mean of two probabilities that is not multiplied by 0, and a normal float32
TINY = tl.constexpr(1.0e-37)
IGNORED_PREDICTION = tl.constexpr(255)


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
    for _ in tl.static_range(C):
        x = x + (tl.load(ptr, mask=mask, other=0.0).to(ACC),)
        ptr += stride_c
    return x


@triton.jit
def softmax(x, C: tl.constexpr):
    """Tuples log p and p of a tuple of logits, and log sum exp."""
    largest = x[0]
    for c in tl.static_range(1, C):
        largest = tl.maximum(largest, x[c])
    e = ()
    total = tl.zeros_like(largest)
    for c in tl.static_range(C):
        e = e + (tl.exp(x[c] - largest),)
        total += e[c]
    log_total = tl.log(total)
    inverse = 1.0 / total
    log_p = ()
    p = ()
    for c in tl.static_range(C):
        log_p = log_p + (x[c] - largest - log_total,)
        p = p + (e[c] * inverse,)
    return log_p, p, largest + log_total


@triton.jit
def log_mean(q, r):
    return tl.log(tl.maximum(0.5 * (q + r), TINY))


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
