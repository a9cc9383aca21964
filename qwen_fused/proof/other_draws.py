"""Parameters that the loss function skips by chance (LayerDrop, stochastic depth): other draws reach them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_fused.common.autograd_graph import graph_leaves
from qwen_fused.proof import frames
from qwen_fused.proof.cuts import Trace
from qwen_fused.proof.subject import Subject

# seeds that are tried
DRAWS = 12


def skipped_by_this_draw(subject: Subject, trace: Trace, missing: Sequence[str]) -> list[str]:
    """Those of the missing parameters that the loss is connected to when the random generators stand elsewhere."""
    labels = trace.labels
    wanted = {id(subject.named[name]): name for name in missing if not trace.depends_on & labels.bit_of(name)}
    reached: set[str] = set()
    for seed in range(DRAWS if wanted else 0):
        for name in _reached(subject, seed, wanted):
            reached.add(name)
        if len(reached) == len(wanted) or (seed == 2 and not _draws(subject, trace)):
            break
    subject.snapshot.reset()
    return [name for name in missing if name in reached]


def _draws(subject: Subject, trace: Trace) -> bool:
    """Whether the loss function draws at all; Python's and numpy's draws are seen by their generators' states."""
    if trace.draws:
        return True
    subject.snapshot.reset()
    before = random.getstate(), np.random.get_state(legacy=True)
    subject.call()
    after = random.getstate(), np.random.get_state(legacy=True)
    return before[0] != after[0] or any(np.any(one != other) for one, other in zip(before[1], after[1], strict=True))


def _reached(subject: Subject, seed: int, wanted: dict[int, str]) -> list[str]:
    subject.evaluations += 1
    subject.snapshot.reset()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    subject.snapshot.seed_generators(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loss = frames.boundary(subject.loss_fn)
        except Exception:
            # a branch that this draw alone takes is not what is judged
            return []
    return [wanted[id(leaf)] for leaf in graph_leaves(loss) if id(leaf) in wanted] if isinstance(loss, Tensor) else []
