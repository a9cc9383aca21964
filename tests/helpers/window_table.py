"""The smallest encode of a prompt window."""

import torch
from torch import Tensor, nn


class Table(nn.Module):
    """The smallest encode: a row per key, with dropout; counts what it is asked."""

    def __init__(self, rows: int = 9):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, rows * 4).view(rows, 4))
        self.dropout = nn.Dropout(0.4)
        self.asked: list[tuple[list[int], bool]] = []

    def forward(self, keys: list[int]) -> Tensor:
        self.asked.append((list(keys), torch.is_grad_enabled()))
        return self.dropout(self.weight[keys]).square()
