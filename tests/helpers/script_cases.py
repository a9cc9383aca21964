"""Parts of scripts that prove-script is tried on: their head, a training loop, a GAN."""

from __future__ import annotations

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
x, y = torch.randn(16, 6), torch.arange(16) % 3


class Net(nn.Module):
    def __init__(self, between=lambda h: h):
        super().__init__()
        self.encoder, self.head, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.head(self.between(torch.tanh(self.encoder(x))))
"""
ENCODER = ("encoder.weight", "encoder.bias")
LOOP = """
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(9):
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
"""
GAN = """
G, D = nn.Linear(4, 6), nn.Linear(6, 1, bias=False)
d_opt, g_opt = torch.optim.Adam(D.parameters()), torch.optim.Adam(G.parameters())
for step in range(3):
    assert step == 0
    fake = G(torch.randn(16, 4))
    d_opt.zero_grad()
    (D(fake.detach()).mean() - D(x).mean()).backward()
    d_opt.step()
    g_opt.zero_grad()
    (-D(fake).mean()).backward()
    g_opt.step()
    raise AssertionError("went on")
"""
