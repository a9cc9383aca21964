"""State that loops keep outside modules, and what steps, hooks and checkpoints do beside the plain way."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from field_derivatives import mlp
from proof_field import X, Y, adamw, case, classified, given
from torch.utils.checkpoint import checkpoint

MEMORY = {"h": torch.zeros(16, 8)}
DRAWS = np.random.default_rng(0)
baseline = 0.0


def recurrent(keep):
    net = nn.ModuleDict({"r": nn.GRUCell(8, 8), "h": nn.Linear(8, 3)})

    def loss():
        h = net["r"](X, MEMORY["h"])
        keep(h)
        return F.cross_entropy(net["h"](h), Y)

    return given(loss, net)


@case("torch")
def recurrent_state_in_a_dict():
    return recurrent(lambda h: MEMORY.update(h=h.detach()))


@case("torch", "applied", "stale cache")
def recurrent_state_in_a_dict_with_its_graph():
    net, kept = nn.ModuleDict({"r": nn.GRUCell(8, 8), "h": nn.Linear(8, 3)}), {"h": torch.zeros(16, 8)}

    def loss():
        kept["h"] = net["r"](X, kept["h"])  # here
        return F.cross_entropy(net["h"](kept["h"]), Y)

    return given(loss, net)


@case("torch")
def score_function_with_a_running_baseline():
    net = mlp(8, 4)

    def loss():
        global baseline
        policy = torch.distributions.Categorical(logits=net(X))
        taken = policy.sample()
        reward = (taken == Y).float()
        out = -(policy.log_prob(taken) * (reward - baseline)).mean()
        baseline = 0.9 * baseline + 0.1 * reward.mean().item()
        return out

    return given(loss, net)


@case("torch")
def mixture_by_a_generator_that_is_a_global():
    net = mlp()

    def loss():
        part = float(DRAWS.beta(0.4, 0.4))
        out = net(part * X + (1 - part) * X.flip(0))
        return part * F.cross_entropy(out, Y) + (1 - part) * F.cross_entropy(out, Y.flip(0))

    return given(loss, net)


@case("torch")
def returns_scaled_by_an_object_of_its_own():
    class Scale:
        def __init__(self):
            self.mean, self.count = 0.0, 0

        def __call__(self, returns):
            self.count += 1
            self.mean += (float(returns.mean()) - self.mean) / self.count
            return returns - 0.5 * self.mean

    net, scale, returns = mlp(8, 1), Scale(), X[:, :1] + 1
    return given(lambda: F.mse_loss(net(X), scale(returns) * (1 + 1 / scale.count)), net)


@case("torch")
def features_remembered_in_a_list_that_is_made_anew():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.past = mlp(8, 8), nn.Linear(16, 3), []

        def forward(self, x):
            features = self.body(x)
            past = torch.stack(self.past).mean(0) if self.past else torch.zeros_like(features)
            self.past.append(features.detach())
            self.past = self.past[-4:]
            return self.head(torch.cat([features, past], 1))

    return classified(Net())


@case("torch", says="is frozen, and moved by the loop itself")
def momentum_encoder_that_the_optimizer_holds_too():
    net = nn.ModuleDict({"q": mlp(8, 8), "k": mlp(8, 8)})
    net["k"].load_state_dict(net["q"].state_dict())
    net["k"].requires_grad_(False)

    def loss():
        with torch.no_grad():
            for q, k in zip(net["q"].parameters(), net["k"].parameters(), strict=True):
                k.lerp_(q, 0.01)
            wanted = net["k"](X)
        return -F.cosine_similarity(net["q"](X + 0.1), wanted).mean() + net["q"](X).square().mean()

    return given(loss, net, torch.optim.SGD(net.parameters(), 0.03))


@case("torch", says="by a mask or another projection: ")
def gradients_of_pruned_weights_masked_in_the_step():
    net = mlp()
    optimizer, kept = torch.optim.SGD(net.parameters(), 0.1), (torch.arange(128).reshape(16, 8) % 19 == 0).float()

    def step():
        net[0].weight.grad.mul_(kept)
        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()

    return classified(net, optimizer=optimizer, step=step)


def scaled(between):
    net = mlp()
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step():
        between(net, scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()

    return classified(net, optimizer=optimizer, backward=lambda loss: scaler.scale(loss).backward(), step=step)


@case("torch", "applied", "unscaled twice")
def scale_taken_off_twice():
    def between(net, scaler, optimizer):
        scaler.unscale_(optimizer)
        for p in net.parameters():
            p.grad.div_(scaler.get_scale())  # here

    return scaled(between)


@case("torch", says="is allowed to")
def reversal_by_a_hook_that_is_allowed():
    net = nn.ModuleDict({"f": nn.Linear(8, 8), "c": nn.Linear(8, 3), "d": nn.Linear(8, 2)})

    def turn_round(grad):
        return -0.3 * grad

    def loss():
        features = torch.tanh(net["f"](X))
        other = features.view_as(features)
        other.register_hook(turn_round)
        return F.cross_entropy(net["c"](features), Y) + F.cross_entropy(net["d"](other), Y % 2)

    return given(loss, net, allow=["turn_round"])


@case("torch", "correct", "wrong")
def checkpoint_with_another_mask():
    net = nn.ModuleDict({"i": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), "h": mlp()})

    def loss():
        h = checkpoint(net["b"], net["i"](X), use_reentrant=False, preserve_rng_state=False)  # here
        return F.cross_entropy(net["h"](h), Y)

    return given(loss, net)


@case("torch", "connected", "backward failed")
def written_over_what_backward_needs():
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 3)})

    def loss():
        h = torch.sigmoid(net["a"](X))  # here
        h += 0.1
        return F.cross_entropy(net["b"](h), Y)

    return given(loss, net)


@case("torch", "applied", "not moved")
def step_that_is_undone():
    net = mlp()
    optimizer, kept = adamw(net), copy.deepcopy(net)

    def step():
        optimizer.step()
        for p, old in zip(net.parameters(), kept.parameters(), strict=True):
            p.data.copy_(old.data)  # here

    return classified(net, optimizer=optimizer, step=step)


@case("torch", "applied", "learning rate 0")
def schedule_that_stays_at_zero():
    net = mlp()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, 1e-3)
    net.schedule = SimpleNamespace(kept=torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 1.0, lambda n: 0.0]))
    return classified(net, optimizer=optimizer)


@case("torch")
def gradients_taken_by_hooks_and_brought_back():
    net, bucket = mlp(), {}
    optimizer = adamw(net)

    def take(p):
        bucket[p], p.grad = p.grad.clone(), None

    def step():
        for p, gradient in bucket.items():
            p.grad = gradient
        optimizer.step()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(take)
    return classified(net, optimizer=optimizer, step=step)


@case("torch", says="steps at its call number 4")
def step_that_is_due_at_its_fourth_call():
    net, calls = mlp(), {"number": 0}
    optimizer = adamw(net)

    def step():
        calls["number"] += 1
        if calls["number"] % 4 == 0:
            optimizer.step()

    return classified(net, optimizer=optimizer, step=step)


@case("torch")
def optimizer_of_somebody_elses_with_its_own_step():
    net = mlp()

    class Plain:
        param_groups = [{"params": list(net.parameters()), "lr": 0.1}]

        def step(self):
            for p in net.parameters():
                p.data.sub_(0.1 * p.grad)

    optimizer = Plain()
    return classified(net, optimizer=optimizer, step=optimizer.step)


@case("torch")
def bias_before_a_normalisation_in_16_bits():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            out = net(X)
        return F.cross_entropy(out.float(), Y)

    return given(loss, net)


@case("torch")
def adversarial_direction_that_is_detached():
    net = mlp()

    def loss():
        with torch.no_grad():
            clean = net(X).softmax(-1)
        near = F.normalize(torch.randn_like(X), dim=-1).requires_grad_()
        (slope,) = torch.autograd.grad(F.kl_div(net(X + 0.1 * near).log_softmax(-1), clean, reduction="sum"), near)
        far = F.normalize(slope, dim=-1).detach()
        return F.cross_entropy(net(X), Y) + F.kl_div(net(X + far).log_softmax(-1), clean, reduction="batchmean")

    return given(loss, net)


@case("torch", "connected", "partial cut")
def forgotten_graph_beside_a_log():
    net, norms = mlp(), []

    def loss():
        out = F.cross_entropy(net(X), Y)
        slopes = torch.autograd.grad(out, list(net.parameters()), retain_graph=True)  # here
        norms.append(slopes[0].detach().norm())
        return out + 5 * sum(g.square().sum() for g in slopes).sqrt()

    return given(loss, net)
