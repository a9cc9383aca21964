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


# optimizers


@case("torch")
def subset_of_what_the_optimizer_steps():
    torch.manual_seed(0)
    reader, head = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), nn.Linear(8, 3)
    target = torch.randn(16, 3)
    optimizer = torch.optim.SGD([*reader.parameters(), *head.parameters()], lr=1e-2, momentum=0.9)
    return given(lambda: F.mse_loss(head(reader(X)), target), dict(reader.named_parameters()), optimizer)


@case("torch")
def optimizer_in_backward():
    net = nn.Linear(8, 3)
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in net.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return classified(net, optimizer=list(optimizers.values()), step=lambda: None)


@case("torch")
def lbfgs_with_its_closure():
    net = nn.Linear(8, 3)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    return classified(net, optimizer=optimizer, step=lambda: optimizer.step(closure))


@case("torch", "refused", r"LBFGS.step needs a closure: give step=lambda: optimizer.step\(closure\)")
def lbfgs_without_a_step():
    net = nn.Linear(8, 3)
    return classified(net, optimizer=torch.optim.LBFGS(net.parameters()))


@case("torch")
def rate_in_a_tensor():
    net = nn.Linear(8, 3)
    return classified(net, optimizer=torch.optim.AdamW(net.parameters(), lr=torch.tensor(1e-3)))


@case("torch", says="warm-up holds the learning rate")
def warm_up_by_hand():
    net = nn.Linear(8, 3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = 0.0
    return classified(net, optimizer=optimizer)


class Bare:
    """An optimizer that derives from nothing, and whose groups have no rate."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params)}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= 1e-3 * p.grad.sign()


@case("torch")
def optimizer_that_derives_from_nothing():
    net = nn.Linear(8, 3)
    return classified(net, optimizer=Bare(net.parameters()))


# not faults


@case("torch", says="gradient cancels to zero")
def bias_that_cancels():
    net, other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(16, 8)
    return given(lambda: -F.logsigmoid(net(X) - net(other)).mean(), net)


@case("torch", says="is frozen, and no optimizer holds it")
def frozen_backbone():
    net = nn.ModuleDict({"backbone": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    net["backbone"].requires_grad_(False)
    return given(lambda: F.cross_entropy(net["head"](net["backbone"](X)), Y), net)


@case("torch", says="keeps its batch statistics")
def batch_norm_frozen_on_purpose():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net[1].eval()
    return classified(net)


@case("torch", says="frozen table of sinusoids")
def sinusoids_kept_as_a_parameter():
    net = nn.ModuleDict({"at": nn.Embedding(16, 8), "h": nn.Linear(8, 3)})
    angle = torch.arange(16.0)[:, None] / 100 ** (torch.arange(4.0) / 4)
    net["at"].weight = nn.Parameter(torch.cat([angle.sin(), angle.cos()], 1), requires_grad=False)
    loss = lambda: F.cross_entropy(net["h"](X + net["at"](torch.arange(16))), Y)  # noqa: E731
    return given(loss, net, torch.optim.AdamW(net.parameters()))


@case("torch")
def parameter_without_elements():
    net = nn.Linear(8, 3)
    net.spare = nn.Parameter(torch.empty(0, 3))
    return given(lambda: F.cross_entropy(net(X), Y) + net.spare.sum(), net)


@case("torch", says="trainable tensors that were not given")
def discriminator_of_another_optimizer():
    net, critic = nn.Linear(8, 8), nn.Linear(8, 1)
    held = torch.optim.Adam(critic.parameters())
    return given(lambda: F.softplus(-critic(net(X))).mean() + 0 * len(held.param_groups), net)


@case("torch", says="Tensor.detach")
def vector_quantiser():
    torch.manual_seed(0)
    net = nn.ModuleDict({"enc": nn.Linear(8, 4), "dec": nn.Linear(4, 8), "book": nn.Embedding(16, 4)})

    def loss():
        z = net["enc"](X)
        q = net["book"](torch.cdist(z, net["book"].weight).argmin(-1))
        out = net["dec"](z + (q - z).detach())
        return F.mse_loss(out, X) + F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())

    return given(loss, net)


@case("torch")
def accumulation_over_micro_batches():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))

    def backward(loss):
        for i in range(4):
            (F.cross_entropy(net(X[4 * i : 4 * i + 4]), Y[4 * i : 4 * i + 4]) / 4).backward()

    return classified(net, backward=backward)


# faults


@case("torch", "correct", "erased")
def zero_grad_before_every_micro_batch():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))
    optimizer = adamw(net)

    def backward(loss):
        for i in range(4):
            optimizer.zero_grad()  # here
            (F.cross_entropy(net(X[4 * i : 4 * i + 4]), Y[4 * i : 4 * i + 4]) / 4).backward()

    return classified(net, optimizer=optimizer, backward=backward)


@case("torch", "correct", "wrong")
def backward_hook_of_a_module():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def halve(module, before, after):  # here
        return tuple(g * 0.5 for g in before)

    net[1].register_full_backward_hook(halve)
    return classified(net)


@case("torch", "connected", "detach")
def codebook_without_a_way_out():
    net = nn.ModuleDict({"enc": nn.Linear(8, 4), "dec": nn.Linear(4, 8), "book": nn.Embedding(16, 4)})

    def loss():
        z = net["enc"](X)
        q = net["book"](torch.cdist(z, net["book"].weight).argmin(-1))
        out = z + (q - z).detach()  # here
        return F.mse_loss(net["dec"](out), X) + F.mse_loss(out, z.detach()) + 0.25 * F.mse_loss(z, q.detach())

    return given(loss, net)


@case("torch", "connected", "partial cut")
def create_graph_forgotten():
    torch.manual_seed(0)
    net, target = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 1)

    def loss():
        weights = dict(net.named_parameters())
        slopes = torch.autograd.grad(F.mse_loss(net(X), target), list(weights.values()))  # here
        fast = {n: p - 0.5 * d for (n, p), d in zip(weights.items(), slopes, strict=True)}
        return F.mse_loss(torch.func.functional_call(net, fast, (X + 0.1,)), target)

    return given(loss, net)


@case("torch", "declared", "unregistered")
def layers_in_a_python_list():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = [nn.Linear(8, 8) for _ in range(2)], nn.Linear(8, 3)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head(x)

    return classified(Net())


@case("torch", "declared", "unregistered")
def parameter_that_was_converted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.shift = nn.Linear(8, 3), nn.Parameter(torch.zeros(8, dtype=torch.float64)).to(torch.float32)

        def forward(self, x):
            return self.head(x + self.shift)

    return classified(Net())


@case("torch", "declared", "unregistered")
def module_in_no_optimizer():
    net, forgotten = nn.Linear(8, 8), nn.Linear(8, 3)
    return given(lambda: F.cross_entropy(forgotten(net(X)), Y), net)


@case("torch", "applied", "clipped before unscaling")
def clip_before_unscaling():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def loss():
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(net(X), Y)

    def step():
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return given(loss, net, optimizer, backward=lambda value: scaler.scale(value).backward(), step=step)


@case("torch")
def clip_after_unscaling():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def loss():
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(net(X), Y)

    def step():
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()

    return given(loss, net, optimizer, backward=lambda value: scaler.scale(value).backward(), step=step)


@case("torch", says="had a gradient before")
def zero_grad_forgotten():
    net = nn.Linear(8, 3)
    optimizer = adamw(net)
    for _ in range(5):
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return classified(net, optimizer=optimizer, backward=lambda value: value.backward(), step=optimizer.step)


@case("torch", "refused", "call the model once first")
def lazy_before_its_first_call():
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))
    return classified(net, optimizer=torch.optim.AdamW(net.parameters()))


@case("torch", "refused", "on the meta device")
def on_the_meta_device():
    with torch.device("meta"):
        net = nn.Linear(8, 3)
    return given(lambda: F.cross_entropy(net(X.to("meta")), Y.to("meta")), net)
