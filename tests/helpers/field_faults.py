"""Loops with one fault: its rung, its kind and, where it has one, its line."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import X, Y, adamw, case, classified, given

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
