"""The planner: a weight-tied recurrent core that turns a source grid into a destination grid in T steps under a prompt.

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
from qwen_fused.config import TrainConfig

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
    color = color.masked_fill((color < 0) | (color >= COLORS), COLORS)
    return F.one_hot(color, COLORS + 1)[..., :COLORS].transpose(2, 3).to(torch.get_default_dtype())


def extent_mask(size: Tensor, height: int, width: int) -> Tensor:
    """[B, 2] sizes -> [B, H, W] bool, True inside the grid."""
    i = torch.arange(height, device=size.device).view(1, height, 1)
    j = torch.arange(width, device=size.device).view(1, 1, width)
    return (i < size[:, 0].view(-1, 1, 1)) & (j < size[:, 1].view(-1, 1, 1))


def cell_inputs(source: Tensor, source_size: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the planner knows of every cell before the first step; no parameter enters.

    Args:
        source: [B, H, W] int64 colours, any value outside [0, C) where there is no cell.
        source_size, size: [B, 2] int64, rows and columns of the source and of the destination.

    Returns:
        Inputs [B, K*C + 6, H, W]: the colour through every view, the two extents, the distance to the four borders; the
        mask of living cells [B, 1, H, W]; and the colours through every view alone [B, K, C, P].
    """
    height, width = source.shape[1:]
    copies = one_hot_views(source, view_indices(source_size, size, height, width))
    inside = extent_mask(source_size, height, width), extent_mask(size, height, width)
    alive = (inside[0] | inside[1]).unsqueeze(1).to(copies.dtype)
    i = torch.arange(height, device=source.device).view(1, height, 1)
    j = torch.arange(width, device=source.device).view(1, 1, width)
    rows, columns = size[:, 0].view(-1, 1, 1), size[:, 1].view(-1, 1, 1)
    borders = [i.expand_as(source), j.expand_as(source), (rows - 1 - i).expand_as(source)]
    borders.append((columns - 1 - j).expand_as(source))
    extents = torch.stack([*inside, *(0.5 ** b.clamp(min=0).float() for b in borders)], 1).to(copies.dtype)
    return torch.cat([copies.flatten(1, 2).unflatten(2, (height, width)), extents], 1), alive, copies


@dataclass
class Plan:
    """A plan of B episodes: step logits [B, T, C, H, W], the backward ones (or None), and the pooled final state."""

    logits: Tensor  # [B, T, C, H, W], step T is the answer
    back_logits: Tensor | None  # [B, T, C, H, W], aligned with logits step by step
    back_input: Tensor | None  # [B, C, H, W], the query as the backward plan reconstructs it
    state: Tensor  # [B, F], mean of the final forward state over the destination cells


class ChannelNorm(nn.Module):
    """RMS norm over the channels of [B, F, H, W], each cell by itself, so that padding never enters."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight


class PlanCore(nn.Module):
    """One planning step: local 3x3 view, row / column / whole-grid context, FiLM by the prompt, residual update."""

    def __init__(self, channels: int, prompt_dim: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.local = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.context = nn.Linear(2 * channels, 2 * channels)
        self.film = nn.Linear(prompt_dim, 4 * channels)
        self.update = nn.Conv2d(2 * channels, channels, 1)
        nn.init.normal_(self.update.weight, std=0.3 / channels**0.5)

    def condition(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [B, 2F, 1, 1] that the prompt asks for; the same at every step."""
        scale, shift = self.film(prompt)[..., None, None].chunk(2, dim=1)
        return scale, shift

    def forward(self, state: Tensor, alive: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(state) * alive
        rows, columns = alive.sum(3, keepdim=True).clamp(min=1), alive.sum(2, keepdim=True).clamp(min=1)
        row, column = x.sum(3, keepdim=True) / rows, x.sum(2, keepdim=True) / columns  # [B, F, H, 1], [B, F, 1, W]
        # a dead cell's zero must not win over living cells that are all negative
        whole = x.masked_fill(alive == 0, -torch.inf).amax((2, 3), keepdim=True)  # [B, F, 1, 1]
        weight_line, weight_whole = self.context.weight.chunk(2, dim=1)
        h = self.local(x)
        h = h + F.conv2d(row, weight_line[..., None, None]) + F.conv2d(column, weight_line[..., None, None])
        h = h + F.conv2d(whole, weight_whole[..., None, None], self.context.bias)
        h = F.gelu(h * (1 + scale) + shift)
        return state + self.update(h) * alive


class GridAgent(nn.Module):
    """Plans T steps from a query grid to its answer under a prompt, and predicts the answer's size.

    Args:
        channels: state width F.
        prompt_dim: prompt width D.
        steps: planning steps T.
    """

    def __init__(self, *, channels: int = 64, prompt_dim: int = 256, steps: int = 5):
        super().__init__()
        self.steps = steps
        views = len(VIEWS)
        # inputs of a cell: its colour through every view, the two extents, and its distance to the four borders
        self.encode = nn.Conv2d(views * COLORS + 2 + 4, channels, 1)
        self.direction = nn.Parameter(torch.randn(2, channels) * 0.1)
        self.core = PlanCore(channels, prompt_dim)
        self.readout_norm = ChannelNorm(channels)
        self.readout = nn.Conv2d(channels, COLORS + views, 1)
        self.view_preference = nn.Linear(prompt_dim, views)
        self.copy_scale = nn.Parameter(torch.tensor(4.0))
        self.size_head = SizeHead(prompt_dim)

    def start(self, source: Tensor, source_size: Tensor, size: Tensor, direction: int) -> tuple[Tensor, ...]:
        """Initial state [B, F, H, W], its mask of living cells [B, 1, H, W] and the copies [B, K, C, P]."""
        inputs, alive, copies = cell_inputs(source, source_size, size)
        return self.embed(inputs, alive, direction), alive, copies

    def embed(self, inputs: Tensor, alive: Tensor, direction: int = 0) -> Tensor:
        """Initial state [B, F, H, W] of cells as `cell_inputs` describes them."""
        return (self.encode(inputs) + self.direction[direction].view(1, -1, 1, 1)) * alive

    def read(self, state: Tensor, prompt: Tensor, copies: Tensor) -> Tensor:
        """Logits [B, C, H, W] of one step: free logits plus a gated copy of the source's views."""
        free, gate = self.readout(self.readout_norm(state)).split([COLORS, copies.shape[1]], dim=1)
        gate = (gate + self.view_preference(prompt)[..., None, None]).softmax(1).flatten(2)  # [B, K, P]
        copied = torch.einsum("bkp,bkcp->bcp", gate, copies.to(gate.dtype)).unflatten(2, state.shape[2:])
        return free + self.copy_scale * copied

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
            target: [B, H, W] int64, the answer the backward planner starts from (training only).
            readouts: emit only the last so many steps (all by default); evaluation needs one.

        Returns:
            A `Plan`; its back_logits and back_input are None without a target.
        """
        batch = prompt.shape[0]
        state, alive, copies = self.start(query, query_size, size, 0)
        if target is not None:
            back = self.start(target, size, query_size, 1)
            state, alive, copies = (torch.cat(x) for x in zip((state, alive, copies), back, strict=True))
            prompt = torch.cat([prompt, prompt])
        scale, shift = self.core.condition(prompt)
        first = self.steps - (readouts or self.steps)
        logits = []
        for step in range(self.steps):
            state = self.core(state, alive, scale, shift)
            if step >= first:
                logits.append(self.read(state, prompt, copies))
        stacked = torch.stack(logits, 1)
        inside = extent_mask(size, *query.shape[1:]).unsqueeze(1).to(state.dtype)
        pooled = (state[:batch] * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
        if target is None:
            return Plan(stacked, None, None, pooled)
        # one more step backwards reaches the input itself; its first emission stands beside step T, its last beside 1
        state = self.core(state[batch:], alive[batch:], scale[batch:], shift[batch:])
        back_input = self.read(state, prompt[batch:], copies[batch:])
        return Plan(stacked[:batch], stacked[batch:].flip(1), back_input, pooled)


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


def make_agent(config: TrainConfig) -> GridAgent:
    """The agent of a configuration, with weights from torch's generator."""
    return GridAgent(channels=config.agent_channels, prompt_dim=config.prompt_dim, steps=config.plan_steps)
