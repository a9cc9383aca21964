"""Loops as other people write them, healthy and broken, each with the right answer: what `test_field.py` proves.

A case returns the arguments of `prove`. `healthy` ones must be proved; of `broken` ones rung and kind are given, and
the line carries "# here" where there is one; `refused` ones raise a ValueError with the given words.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


@dataclass(frozen=True)
class Case:
    """One loop: what is built, from which library, and what is right to say of it."""

    library: str
    build: Callable[[], dict[str, Any]]
    answer: str  # "proved", "refused", or the rung that breaks
    says: str = ""  # kind of the finding, words of the error or of a note

    @property
    def name(self) -> str:
        return self.build.__name__


CASES: list[Case] = []


def case(library: str, answer: str = "proved", says: str = ""):
    def add(build):
        CASES.append(Case(library, build, answer, says))
        return build

    return add


def adamw(model, lr=1e-3):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def given(loss, model, optimizer=None, **more):
    return {"loss_fn": loss, "params": model, "optimizer": optimizer or adamw(model), **more}


def classified(model, **more):
    return given(lambda: F.cross_entropy(model(X), Y), model, **more)


# float beside integer, complex


@case("torch")
def maximum_over_a_dimension():
    net = nn.Linear(8, 4)
    return given(lambda: net(X).max(-1).values.pow(2).mean(), net)


@case("torch")
def sorted_and_top():
    net = nn.Linear(8, 6)
    return given(lambda: net(X).sort(-1)[0][:, 2:].pow(2).mean() + net(X).topk(2).values.mean(), net)


@case("torch")
def median_and_cummax():
    net = nn.Linear(8, 5)
    return given(lambda: net(X).median(1).values.pow(2).mean() + net(X).cummax(1).values.pow(2).mean(), net)


@case("torch")
def categorical_log_prob():
    net, reward = nn.Linear(8, 3), torch.randn(16)
    return given(lambda: -(torch.distributions.Categorical(logits=net(X)).log_prob(Y) * reward).mean(), net)


@case("torch")
def packed_lstm():
    net, x = nn.LSTM(8, 4, batch_first=True), torch.randn(4, 6, 8)
    lengths = torch.tensor([6, 5, 3, 2])

    def loss():
        # the packing takes a float and gives an integer beside it
        packed = nn.utils.rnn.pack_padded_sequence(x * 1.0, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(net(packed)[0], batch_first=True)[0].pow(2).mean()

    return given(loss, net)


@case("torch")
def mixture_of_experts():
    net = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": nn.ModuleList([nn.Linear(8, 3) for _ in range(4)])})

    def loss():
        weight, chosen = net["gate"](X).softmax(-1).topk(2)
        outs = torch.stack([expert(X) for expert in net["experts"]], 1)
        picked = outs.gather(1, chosen[..., None].expand(-1, -1, 3))
        return F.cross_entropy((weight[..., None] * picked).sum(1), Y)

    return given(loss, net)


@case("torch")
def complex_parameters():
    net, z = nn.Linear(8, 4, dtype=torch.complex64), torch.randn(16, 8, dtype=torch.complex64)
    return given(lambda: (net(z).abs() - 1).pow(2).mean(), net, torch.optim.Adam(net.parameters(), 1e-3))


@case("torch")
def complex_rotary():
    net, h = nn.Linear(8, 8), torch.randn(4, 6, 8)
    angles = torch.polar(torch.ones(6, 4), torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]))

    def loss():
        q = torch.view_as_real(torch.view_as_complex(net(h).view(4, 6, 4, 2)) * angles).flatten(-2)
        return (q @ q.transpose(1, 2)).softmax(-1).pow(2).mean()

    return given(loss, net)


@case("torch")
def fourier_mixing():
    net = nn.Linear(8, 8)
    return given(lambda: torch.fft.fft2(net(X)).real.pow(2).mean() + torch.fft.rfft(net(X)).abs().mean(), net)


@case("torch")
def stft_loss():
    net, window = nn.Linear(8, 64), torch.hann_window(16)
    return given(lambda: torch.stft(net(X), 16, 8, window=window, return_complex=True).abs().log1p().mean(), net)


# surrogates of torch's own


@case("torch")
def gumbel_softmax_hard():
    net, reward = nn.Linear(8, 4), torch.randn(16, 4)
    return given(lambda: -(F.gumbel_softmax(net(X), hard=True) * reward).sum(-1).mean(), net)


@case("torch")
def fake_quantise():
    net = nn.Linear(8, 3)
    return given(lambda: F.cross_entropy(torch.fake_quantize_per_tensor_affine(net(X), 0.1, 0, -128, 127), Y), net)


@case("torch")
def rsample_of_gamma_and_dirichlet():
    net = nn.Linear(8, 3)

    def loss():
        concentration = F.softplus(net(X)) + 0.5
        gamma = torch.distributions.Gamma(concentration, torch.ones(3)).rsample()
        return gamma.pow(2).mean() + torch.distributions.Dirichlet(concentration).rsample().pow(2).sum(-1).mean()

    return given(loss, net)


@case("torch")
def straight_through_allowed_by_name():
    net = nn.Linear(8, 3)
    return given(lambda: F.cross_entropy(F.hardtanh(net(X)), Y), net, allow=("hardtanh",))


# random numbers


@case("torch")
def stochastic_depth_then_dropout():
    torch.manual_seed(2)
    net = nn.ModuleDict({"a": nn.Linear(8, 32), "b": nn.Linear(32, 32), "h": nn.Linear(32, 3)})
    net["h"].weight.data.mul_(1e-3)
    net["h"].bias.data.zero_()

    def loss():
        h = torch.tanh(net["a"](X))
        keep = (0.9 + torch.rand(len(X), 1, dtype=h.dtype)).floor()
        return F.cross_entropy(net["h"](F.dropout(h + torch.tanh(net["b"](h)) * keep / 0.9, 0.5)), Y)

    return given(loss, net)


@case("torch", says="is skipped by this draw")
def layer_drop():
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)])

    def loss():
        h = X
        for layer in net[:2]:
            if torch.rand(()) < 0.5:
                h = torch.tanh(layer(h))
        return F.cross_entropy(net[2](h), Y)

    torch.manual_seed(1)
    return given(loss, net)


# writes that are none; state


@case("torch")
def gan_step_with_a_frozen_discriminator():
    net = nn.ModuleDict({"g": nn.Linear(8, 8), "d": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))})

    def loss():
        fake = net["g"](X)
        critic = F.softplus(-net["d"](X)).mean() + F.softplus(net["d"](fake.detach())).mean()
        net["d"].requires_grad_(False)
        generator = F.softplus(-net["d"](fake)).mean()
        net["d"].requires_grad_(True)
        return critic + generator

    return given(loss, net)


@case("torch")
def recurrent_state_kept_on_the_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.h, self.hidden = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3), None

        def forward(self, x):
            out, state = self.r(x, self.hidden)
            self.hidden = tuple(t.detach() for t in state)
            return self.h(out[:, -1])

    net, x = Net(), torch.randn(16, 5, 8)
    return given(lambda: F.cross_entropy(net(x), Y), net)


@case("torch")
def momentum_encoder_and_queue():
    class Moco(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)
            self.k.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(4, 32), dim=0))

        def forward(self, x):
            q = F.normalize(self.q(x), dim=1)
            with torch.no_grad():
                for a, b in zip(self.q.parameters(), self.k.parameters(), strict=True):
                    b.data = b.data * 0.9 + a.data * 0.1
                k = F.normalize(self.k(x + 0.1), dim=1)
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], 1) / 0.2
            self.queue.data = torch.cat([k.T, self.queue.data[:, 16:]], 1)
            return F.cross_entropy(logits, torch.zeros(16, dtype=torch.long))

    net = Moco()
    return given(lambda: net(X), net)


@case("torch")
def embedding_with_a_largest_norm():
    net, index = nn.ModuleDict({"e": nn.Embedding(20, 8, max_norm=1.0), "h": nn.Linear(8, 3)}), torch.arange(16)
    return given(lambda: F.cross_entropy(net["h"](net["e"](index)), Y), net)


@case("torch", says="computed by other threads")
def parts_in_a_thread_pool():
    net = nn.Linear(8, 3)

    def loss():
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(lambda i: F.cross_entropy(net(X[8 * i : 8 * i + 8]), Y[8 * i : 8 * i + 8]), range(2))
            return torch.stack(list(parts)).mean()

    return given(loss, net)


@case("torch")
def forward_mode_in_the_loss():
    net, v = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 8)

    def loss():
        u, du = torch.func.jvp(net, (X,), (v,))
        return (u + du).pow(2).mean()

    return given(loss, net)


@case("torch")
def gradient_penalty():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return net(X).mean() + (slope.norm(dim=1) - 1).pow(2).mean()

    return given(loss, net, torch.optim.SGD(net.parameters(), 1e-3))
