"""A prompt window that several processes fill together, saved as if one had, so that any number of them can go on.

Each process holds the prompts of its own parts of the batches; the gradient of a prompt that two of them use is the
sum of both. Generators matter to dropout alone, which on a part of a batch falls otherwise anyway: those of the first
process stand for all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_fused.parallel.processes import Ranks
from qwen_fused.window.prompt_window import PromptWindow

Keys = Sequence[Hashable]


def gather_window_state(window: PromptWindow, batches: Sequence[Keys], ranks: Ranks) -> dict[str, Any]:
    """The window's state with the prompts and gradients of every process. A collective.

    Args:
        window: this process's.
        batches: the keys of the window's whole batches so far.
        ranks: this process among all.
    """
    state = window.state_dict()
    if ranks.world_size == 1 or not state["batches"]:
        return state
    chunks = new_keys(batches)
    place = {key: index for index, key in enumerate(key for chunk in chunks for key in chunk)}
    mine = torch.tensor([place[key] for key in window.rows])
    outputs = torch.cat(state["outputs"])
    held = outputs.new_zeros(len(place), dtype=torch.float32)
    held[mine] = 1.0
    outputs = ranks.all_reduce(_scattered(mine, outputs, len(place))) / ranks.all_reduce(held)[:, None]
    counts = [len(chunk) for chunk in chunks]
    return {
        **state,
        "starts": [sum(counts[:k]) for k in range(len(counts))],
        "outputs": list(outputs.split(counts)),
        "gradient": ranks.all_reduce(_scattered(mine, state["gradient"], len(place))),
        **{name: _padded(state[name], len(counts)) for name in ("rng_cpu", "rng_cuda", "autocast")},
    }


def scatter_window_state(
    state: dict[str, Any], batches: Sequence[Keys], ranks: Ranks
) -> tuple[dict[str, Any], list[Hashable]]:
    """This process's share of a whole window's state, and the keys that it holds, for `PromptWindow.load_state_dict`.

    Args:
        state: from `gather_window_state`, or of one process alone.
        batches: as there.
        ranks: this process among all.
    """
    if ranks.world_size == 1 or not state["batches"]:
        return state, [key for batch in batches for key in batch]
    place = {key: index for index, key in enumerate(key for chunk in new_keys(batches) for key in chunk)}
    parts = [[batch[ranks.part(len(batch), rank).rows] for batch in batches] for rank in range(ranks.world_size)]
    # the first process that uses a prompt takes its gradient so far
    owner: dict[Hashable, int] = {}
    for rank, part in enumerate(parts):
        for keys in part:
            for key in keys:
                owner.setdefault(key, rank)
    chunks = new_keys(parts[ranks.rank])
    keys = [key for chunk in chunks for key in chunk]
    rows = torch.tensor([place[key] for key in keys])
    owned = torch.tensor([owner[key] == ranks.rank for key in keys])
    counts = [len(chunk) for chunk in chunks]
    mine = {
        **state,
        "starts": [sum(counts[:k]) for k in range(len(counts))],
        "outputs": list(torch.cat(state["outputs"])[rows].split(counts)),
        "gradient": state["gradient"][rows] * owned[:, None],
        **{name: _padded(state[name], len(counts)) for name in ("rng_cpu", "rng_cuda", "autocast")},
    }
    return mine, keys


def new_keys(batches: Sequence[Keys]) -> list[list[Hashable]]:
    """Per batch that brings any the keys that no batch before it had, in their order."""
    seen: dict[Hashable, None] = {}
    chunks = []
    for batch in batches:
        new = [key for key in dict.fromkeys(batch) if key not in seen]
        seen |= dict.fromkeys(new)
        chunks += [new] if new else []
    return chunks


def _scattered(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """`values` in their rows of [count, ...] zeros."""
    return values.new_zeros((count, *values.shape[1:])).index_copy_(0, rows.to(values.device), values)


def _padded(entries: list[Any], count: int) -> list[Any]:
    return (entries + entries[-1:] * count)[:count]
