"""The agent: a weight-tied recurrent core that turns a source grid into a destination grid in T steps under a prompt.

Both directions run through the same core in one batch: forward from the query to the answer, backward (training
only) from the answer to the query. The state is carried over the steps and read out at each of them, so every step
has logits of its own and every step's logits see a different state.

A readout is a pointer-generator (See et al., 2017): free logits from the state, plus a gated copy of the source seen
through a fixed set of resampled views (identity, the dihedral group, rescale, tile, ...).

Axis legend: B episodes, T plan steps, C colours, H W canvas, P = H*W cells, K views, D prompt width, F state width,
S sides, of 1 to 30 cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qwen_fused.arc.episodes import COLORS, MAX_SIDE
from qwen_fused.planner.plan_core import PlanCore, inverse_rms

VIEWS = (
    "identity",
    "flip_columns",
    "flip_rows",
    "rotate_180",
    "transpose",
    "rotate_90",
    "rotate_270",
    "anti_transpose",
    "rescale",
    "tile",
    "tile_mirrored",
    "bottom_right",
)


def view_indices(source_size: Tensor, destination_size: Tensor, height: int, width: int) -> Tensor:
    """Where each destination cell looks in the source, per view.

    Args:
        source_size: [B, 2] int64, rows and columns of the source grid.
        destination_size: [B, 2] int64, rows and columns of the destination grid.
        height, width: the canvas.

    Returns:
        [B, K, P] int64 flat index into the source canvas, -1 where the view falls outside the source.
    """
    device = source_size.device
    i = torch.arange(height, device=device).view(1, height, 1)
    j = torch.arange(width, device=device).view(1, 1, width)
    h, w = (x.view(-1, 1, 1) for x in source_size.clamp(min=1).unbind(1))  # [B, 1, 1]
    dh, dw = (x.view(-1, 1, 1) for x in destination_size.clamp(min=1).unbind(1))
    i, j = i.expand(h.shape[0], height, width), j.expand(h.shape[0], height, width)
    mirrored_i = torch.where(i.div(h, rounding_mode="floor") % 2 == 0, i % h, h - 1 - i % h)
    mirrored_j = torch.where(j.div(w, rounding_mode="floor") % 2 == 0, j % w, w - 1 - j % w)
    rows_columns = [
        (i, j),
        (i, w - 1 - j),
        (h - 1 - i, j),
        (h - 1 - i, w - 1 - j),
        (j, i),
        (h - 1 - j, i),
        (j, w - 1 - i),
        (h - 1 - j, w - 1 - i),
        (i * h // dh, j * w // dw),
        (i % h, j % w),
        (mirrored_i, mirrored_j),
        (i + h - dh, j + w - dw),
    ]
    row, column = (torch.stack(x, 1) for x in zip(*rows_columns, strict=True))  # [B, K, H, W]
    h, w = h.unsqueeze(1), w.unsqueeze(1)
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return torch.where(inside, row * width + column, -1).flatten(2)


def one_hot_views(source: Tensor, indices: Tensor) -> Tensor:
    """Gather the source grid through the views: [B, H, W] colours, [B, K, P] -> [B, K, C, P] zeros and ones."""
    flat = source.flatten(1).unsqueeze(1).expand(-1, indices.shape[1], -1)
    color = flat.gather(2, indices.clamp(min=0)).masked_fill(indices < 0, COLORS)
    each = torch.arange(COLORS, device=source.device).unsqueeze(1)
    return (color.unsqueeze(2) == each).to(torch.get_default_dtype())


def extent_mask(size: Tensor, height: int, width: int) -> Tensor:
    """[B, 2] sizes -> [B, H, W] bool, True inside the grid."""
    i = torch.arange(height, device=size.device).view(1, height, 1)
    j = torch.arange(width, device=size.device).view(1, 1, width)
    return (i < size[:, 0].view(-1, 1, 1)) & (j < size[:, 1].view(-1, 1, 1))


@dataclass
class Cells:
    """What the planner knows of every cell before the first step; no parameter enters."""

    inputs: Tensor  # [B, H, W, K*C + 6]: the colour through every view, the two extents, the distance to the borders
    alive: Tensor  # [B, H, W] 1 inside the source or the destination, else 0
    copies: Tensor  # [B, K, C, H, W] the colour through every view


def describe_cells(source: Tensor, source_size: Tensor, size: Tensor) -> Cells:
    """Describe the cells of source grids and of destinations of the given sizes.

    Args:
        source: [B, H, W] int64 colours, any value outside [0, C) where there is no cell.
        source_size, size: [B, 2] int64, rows and columns of the source and of the destination.
    """
    height, width = source.shape[1:]
    copies = one_hot_views(source, view_indices(source_size, size, height, width)).unflatten(3, (height, width))
    inside = extent_mask(source_size, height, width), extent_mask(size, height, width)
    alive = (inside[0] | inside[1]).to(copies.dtype)
    i = torch.arange(height, device=source.device).view(1, height, 1)
    j = torch.arange(width, device=source.device).view(1, 1, width)
    rows, columns = size[:, 0].view(-1, 1, 1), size[:, 1].view(-1, 1, 1)
    borders = [i.expand_as(source), j.expand_as(source), (rows - 1 - i).expand_as(source)]
    borders.append((columns - 1 - j).expand_as(source))
    extents = torch.stack([*inside, *(0.5 ** b.clamp(min=0).float() for b in borders)], 3).to(copies.dtype)
    return Cells(torch.cat([copies.flatten(1, 2).permute(0, 2, 3, 1), extents], 3), alive, copies)


@dataclass
class Plan:
    """A plan of B episodes: step logits [B, T, C, H, W], the backward ones (or None), and the pooled final state."""

    logits: Tensor  # [B, T, C, H, W], step T is the answer
    back_logits: Tensor | None  # [B, T, C, H, W], aligned with logits step by step
    back_input: Tensor | None  # [B, C, H, W], the query as the backward plan reconstructs it
    state: Tensor  # [B, F], mean of the final forward state over the destination cells


class GridAgent(nn.Module):
    """Plans T steps from a query grid to its answer under a prompt, and predicts the answer's size.

    Args:
        channels: state width F.
        prompt_dim: prompt width D.
        steps: planning steps T.
    """

    def __init__(self, *, channels: int = 32, prompt_dim: int = 256, steps: int = 3):
        super().__init__()
        self.steps = steps
        views = len(VIEWS)
        # inputs of a cell: its colour through every view, the two extents, and its distance to the four borders
        self.encode = nn.Linear(views * COLORS + 2 + 4, channels)
        self.direction = nn.Parameter(torch.randn(2, channels) * 0.1)
        self.core = PlanCore(channels, prompt_dim)
        self.readout_norm = nn.Parameter(torch.ones(channels))
        self.readout = nn.Linear(channels, COLORS + views)
        self.view_preference = nn.Linear(prompt_dim, views)
        self.copy_scale = nn.Parameter(torch.tensor(4.0))
        self.size_head = SizeHead(prompt_dim)

    def embed(self, cells: Cells, direction: int = 0) -> Tensor:
        """Initial state [B, 1, H, W, F]; direction 0 plans from the query to the answer, 1 back."""
        state = self.encode(cells.inputs) + self.direction[direction]
        return (state * cells.alive.unsqueeze(-1)).unsqueeze(1)

    def read(self, states: Tensor, prompt: Tensor, copies: Tensor) -> Tensor:
        """Logits [B, T, C, H, W] of states [T, B, 1, H, W, F]: free ones plus a gated copy of the source's views."""
        x = states[:, :, 0]
        # the readout of the normed state; a cell's rms is a number, and its readout is narrower than its state
        weight = self.readout.weight * self.readout_norm
        read = torch.addcmul(self.readout.bias, x @ weight.t(), inverse_rms(x))
        free, gate = read.split([COLORS, copies.shape[1]], dim=-1)
        gate = (gate + self.view_preference(prompt)[:, None, None]).softmax(-1)  # [T, B, H, W, K]
        copied = torch.einsum("tbhwk,bkchw->btchw", gate, copies.to(gate.dtype))
        return free.permute(1, 0, 4, 2, 3) + self.copy_scale * copied

    def plan(self, cells: Cells, prompt: Tensor, readouts: int | None = None) -> Tensor:
        """The forward plan alone: logits [B, T, C, H, W] of the last `readouts` steps, all by default."""
        states = self.core(self.embed(cells), cells.alive, prompt, self.steps)
        return self.read(states[-(readouts or self.steps) :], prompt, cells.copies)

    def forward(
        self,
        prompt: Tensor,
        query: Tensor,
        query_size: Tensor,
        size: Tensor,
        *,
        target: Tensor | None = None,
        readouts: int | None = None,
    ) -> Plan:
        """Plan forward, and backward too when the target is given.

        Args:
            prompt: [B, D] float.
            query: [B, H, W] int64 colours, any value outside [0, C) where there is no cell.
            query_size, size: [B, 2] int64, rows and columns of the query and of the answer to plan for.
            target: [B, H, W] int64, the answer the backward plan starts from (training only).
            readouts: emit only the last so many steps (all by default); evaluation needs one.

        Returns:
            A `Plan`; its back_logits and back_input are None without a target.
        """
        batch = prompt.shape[0]
        cells = describe_cells(query, query_size, size)
        state, alive, copies = self.embed(cells), cells.alive, cells.copies
        if target is not None:
            back = describe_cells(target, size, query_size)
            state, alive = torch.cat([state, self.embed(back, 1)]), torch.cat([alive, back.alive])
            copies, prompt = torch.cat([copies, back.copies]), torch.cat([prompt, prompt])
        states = self.core(state, alive, prompt, self.steps)
        logits = self.read(states[-(readouts or self.steps) :], prompt, copies)
        inside = extent_mask(size, *query.shape[1:]).unsqueeze(-1).to(states.dtype)
        pooled = (states[-1, :batch, 0] * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        if target is None:
            return Plan(logits, None, None, pooled)
        # one more step backwards reaches the input itself; its first emission stands beside step T, its last beside 1
        last = self.core(states[-1, batch:], alive[batch:], prompt[batch:], 1)
        back_input = self.read(last, prompt[batch:], copies[batch:])[:, 0]
        return Plan(logits[:batch], logits[batch:].flip(1), back_input, pooled)


class SizeHead(nn.Module):
    """Logits over the answer's height and width: free ones, plus a pointer to sizes the demonstrations suggest."""

    # the query's side, its other side, the demonstrations' output side, the query's side times their ratio
    candidates = 4

    def __init__(self, prompt_dim: int, hidden: int = 128):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(prompt_dim + 2 * MAX_SIDE, hidden), nn.GELU())
        self.free = nn.Linear(hidden, 2 * MAX_SIDE)
        self.gate = nn.Linear(hidden, 2 * self.candidates)
        nn.init.normal_(self.free.weight, std=0.02)

    def forward(self, prompt: Tensor, query_size: Tensor, demo_sizes: Tensor) -> Tensor:
        """Logits [B, 2, S] of (height, width) - 1.

        Args:
            prompt: [B, D] float.
            query_size: [B, 2] int64.
            demo_sizes: [B, 4] float, the demonstrations' mean rows in, columns in, rows out, columns out.
        """
        own = query_size.to(demo_sizes.dtype)
        mean_in, mean_out = demo_sizes[:, :2], demo_sizes[:, 2:]
        sides = torch.stack([own, own.flip(1), mean_out, own * mean_out / mean_in.clamp(min=1)], 2)  # [B, 2, 4]
        sides = (sides.round().long() - 1).clamp(0, MAX_SIDE - 1)
        pointers = F.one_hot(sides, MAX_SIDE).to(prompt.dtype)  # [B, 2, 4, S]
        own_hot = F.one_hot((query_size - 1).clamp(0, MAX_SIDE - 1), MAX_SIDE).flatten(1).to(prompt.dtype)
        h = self.trunk(torch.cat([prompt, own_hot], 1))
        gate = self.gate(h).unflatten(1, (2, self.candidates))
        return self.free(h).unflatten(1, (2, -1)) + torch.einsum("bsk,bskn->bsn", gate, pointers)
