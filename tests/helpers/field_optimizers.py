"""Optimizers as loops have them: a subset, in backward, with a closure, without a rate; and what is no fault."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import X, Y, case, classified, given

# optimizers


@case("torch")
def subset_of_what_the_optimizer_steps():
    torch.manual_seed(0)
    reader, head = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), nn.Linear(8, 3)
    target = torch.randn(16, 3)
    # the head, which is not named, goes much further
    groups = [{"params": [*reader.parameters()]}, {"params": [*head.parameters()], "lr": 5.0}]
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
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


@case("torch", says="gradient cancels to zero")
def bias_that_cancels_in_one_call():
    net, other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(16, 8)

    def loss():
        one, two = net(torch.cat([X, other])).chunk(2)
        return (one - two).mean()

    return given(loss, net)


@case("torch", says="is frozen, and no optimizer holds it")
def frozen_backbone_in_evaluation_mode():
    net = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(8, 8), nn.Dropout()), "head": nn.Linear(8, 3)})
    net["backbone"].requires_grad_(False).eval()
    return given(lambda: F.cross_entropy(net["head"](net["backbone"](X)), Y), net)


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
