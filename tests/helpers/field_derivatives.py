"""Losses that take derivatives themselves, gradients brought by hooks or by hand, lookups with padding."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from proof_field import X, Y, case, classified, given


def mlp(inputs: int = 8, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


@case("torch", says="the loss takes a derivative that 2.bias drops out of")
def energy_whose_forces_are_trained():
    net = mlp(8, 1)

    def loss():
        x = X.clone().requires_grad_()
        (force,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (force - 1).pow(2).mean()

    return given(loss, net)


@case("torch", says="the loss takes a derivative that 2.bias drops out of")
def energy_differentiated_by_func():
    net = mlp(8, 1)
    force = torch.vmap(torch.func.grad(lambda x: net(x).squeeze()))
    return given(lambda: (force(X) - 1).pow(2).mean(), net)


@case("torch")
def residual_of_a_differential_equation():
    net, points = mlp(2, 1), X[:, :2]

    def loss():
        p = points.clone().requires_grad_()
        u = net(p)
        (du,) = torch.autograd.grad(u.sum(), p, create_graph=True)
        (dux,) = torch.autograd.grad(du[:, 1].sum(), p, create_graph=True)
        return (du[:, 0] + u[:, 0] * du[:, 1] - 0.01 * dux[:, 1]).pow(2).mean()

    return given(loss, net)


@case("torch", "connected", "partial cut")
def forces_without_a_graph():
    net, energy, forces = mlp(8, 1), torch.randn(16, 1), torch.randn(16, 8)

    def loss():
        x = X.clone().requires_grad_()
        e = net(x)
        (f,) = torch.autograd.grad(-e.sum(), x, retain_graph=True)  # here
        return F.mse_loss(e, energy) + 10 * F.mse_loss(f, forces)

    return given(loss, net)


@case("torch", says="brings the gradient that is cut at")
def fixed_point_with_an_implicit_gradient():
    net = nn.ModuleDict({"f": nn.Linear(8, 8), "inject": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    net["f"].weight.data.mul_(0.3)

    def loss():
        u = net["inject"](X)
        with torch.no_grad():
            z = torch.zeros(16, 8)
            for _ in range(40):
                z = torch.tanh(net["f"](z) + u)
        z = torch.tanh(net["f"](z) + u)
        leaf = z.detach().requires_grad_()
        again = torch.tanh(net["f"](leaf) + u.detach())

        def solve(grad):
            found = grad
            for _ in range(40):
                found = torch.autograd.grad(again, leaf, found, retain_graph=True)[0] + grad
            return found

        z.register_hook(solve)
        return F.cross_entropy(net["head"](z), Y)

    return given(loss, net)


@case("torch")
def hooks_that_only_look():
    net, norms = mlp(), []

    def loss():
        h = net[0](X)
        h.retain_grad()
        h.register_hook(lambda grad: norms.append(float(grad.norm())))
        return F.cross_entropy(net[2](torch.tanh(h)), Y)

    return given(loss, net)


@case("torch", "nonzero", "zero")
def hook_that_leaves_zeros():
    net = mlp()

    def loss():
        h = torch.tanh(net[0](X))
        h.register_hook(lambda grad: None)
        h.register_hook(torch.zeros_like)  # here
        return F.cross_entropy(net[2](h), Y)

    return given(loss, net)


@case("torch", "correct", "wrong")
def second_of_two_hooks_scales():
    net = mlp()

    def loss():
        h = torch.tanh(net[0](X))
        h.register_hook(lambda grad: None)
        h.register_hook(lambda grad: 3 * grad)  # here
        return F.cross_entropy(net[2](h), Y)

    return given(loss, net)


@case("torch")
def gradients_put_in_place_by_hand():
    net = mlp()
    parameters = list(net.parameters())

    def backward(loss):
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = grad

    return classified(net, backward=backward)


@case("torch", "connected", "unseen")
def gradients_put_in_place_but_one():
    net = mlp()
    parameters = list(net.parameters())

    def backward(loss):
        for p, grad in zip(parameters[:-1], torch.autograd.grad(loss, parameters)[:-1], strict=True):
            p.grad = grad

    return classified(net, backward=backward)


@case("torch", "correct", "wrong")
def gradients_put_in_the_wrong_places():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    parameters = list(net.parameters())
    places = [net[2].weight, parameters[1], net[0].weight, *parameters[3:]]

    def backward(loss):
        for p, grad in zip(places, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = grad

    return classified(net, backward=backward)


@case("torch", "correct", "wrong")
def loss_sent_back_with_the_wrong_sign():
    net = mlp()
    return classified(
        net, optimizer=torch.optim.SGD(net.parameters(), 0.1), backward=lambda loss: loss.neg().backward()
    )


@case("torch", says="the loss function leaves gradients in")
def attack_whose_gradients_are_left():
    net = mlp()

    def loss():
        moved = torch.zeros_like(X, requires_grad=True)
        F.cross_entropy(net(X + moved), Y).backward()
        return F.cross_entropy(net(X + 0.05 * moved.grad.sign()), Y)

    return given(loss, net)


@case("torch")
def lookup_with_padding():
    net = nn.ModuleDict({"e": nn.Embedding(30, 8, padding_idx=-1), "h": nn.Linear(8, 3)})
    index = torch.arange(64).reshape(16, 4) % 30
    return given(lambda: F.cross_entropy(net["h"](net["e"](index).mean(1)), Y), net)


@case("transformers")
def padded_batch_pooled_over_all_tokens():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64}
    body = BertModel(BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=4), add_pooling_layer=False)
    net, ids = nn.ModuleDict({"body": body, "head": nn.Linear(32, 3)}).train(), torch.randint(3, 99, (16, 8))
    ids[:, 5:] = 0
    return given(lambda: F.cross_entropy(net["head"](body(input_ids=ids).last_hidden_state.mean(1)), Y), net)


@case("torch", "connected", "data")
def prompt_written_through_an_alias():
    net = nn.ModuleDict({"table": nn.Embedding(20, 8), "head": nn.Linear(8, 3)})
    net["table"].requires_grad_(False)
    net.prompt = nn.Parameter(torch.randn(2, 8))

    def loss():
        rows = net["table"](torch.arange(64).reshape(16, 4) % 20).clone()
        rows.data[:, :2] = net.prompt  # here
        return F.cross_entropy(net["head"](rows.mean(1)), Y)

    return given(loss, net)


@case("torch", "connected", "data")
def results_written_through_an_alias():
    net, start = mlp(), torch.zeros(16, 3, requires_grad=True)

    def loss():
        out = start.clone()
        out.data[:] = net(X)  # here
        return F.cross_entropy(out, Y)

    return given(loss, net)


@case("torch", "nonzero", "zero")
def reference_that_is_the_policy_itself():
    policy, chosen = mlp(8, 5), torch.arange(16)[:, None] % 5
    reference = policy

    def log_prob(net, taken):
        return net(X).log_softmax(-1).gather(1, taken).squeeze(1)

    def loss():
        margin = log_prob(policy, chosen) - log_prob(reference, chosen)
        return -F.logsigmoid(
            0.1 * (margin - log_prob(policy, (chosen + 1) % 5) + log_prob(reference, (chosen + 1) % 5))
        ).mean()

    return given(loss, policy)


@case("torch", "applied", "stale cache")
def recurrent_state_kept_with_its_graph():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.h, self.state = nn.GRUCell(8, 8), nn.Linear(8, 3), torch.zeros(16, 8)

        def forward(self, x):
            self.state = self.r(x, self.state)  # here
            return self.h(self.state)

    return classified(Net())


@case("torch", "applied", "learning rate 0")
def rate_that_has_decayed_to_nothing():
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 3)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    return classified(net, optimizer=optimizer)


@case("torch")
def target_network_of_a_double_q_learner():
    net = mlp(8, 4)
    target, taken = copy.deepcopy(net), torch.arange(16)[:, None] % 4

    def loss():
        with torch.no_grad():
            best = net(X + 0.1).argmax(1, keepdim=True)
            wanted = 1 + 0.9 * target(X + 0.1).gather(1, best)
        return F.smooth_l1_loss(net(X).gather(1, taken), wanted)

    return given(loss, net)
