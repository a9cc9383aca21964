"""Gradients that are changed on purpose after autograd made them: masks, clamps, private noise; and by mistake."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from field_derivatives import mlp
from proof_field import X, Y, case, classified
from torch.func import functional_call, grad, vmap

HALF = (torch.arange(128).reshape(16, 8) % 2).float()
CHANGES = "changes its gradient: judged before the hook"


@case("torch", says=CHANGES)
def mask_by_a_hook():
    net = mlp()
    net[0].weight.register_hook(lambda g: g * HALF)
    return classified(net)


@case("torch", says=CHANGES)
def sparse_mask_once_it_is_accumulated():
    net = mlp()
    kept = (torch.arange(128).reshape(16, 8) % 9 == 0).float()

    def hook(p):
        p.grad.mul_(kept)

    net[0].weight.register_post_accumulate_grad_hook(hook)
    return classified(net)


@case("torch", says=CHANGES)
def gradients_clamped_by_hooks():
    net = mlp()
    for p in net.parameters():
        p.register_hook(lambda g: g.clamp(-0.005, 0.005))
    return classified(net)


@case("torch", says=CHANGES)
def one_layer_with_ten_times_the_gradient():
    net = mlp()
    net[2].weight.register_hook(lambda g: 10 * g)
    return classified(net, optimizer=torch.optim.SGD(net.parameters(), 1e-2))


@case("torch")
def parameter_hooks_that_only_look():
    net, norms = mlp(), []
    for p in net.parameters():
        p.register_hook(lambda g: norms.append(g.norm()))
    return classified(net)


def private(net, clip: float, noise: float, sign: float = 1.0):
    """Gradients of single samples, clipped, with noise of a generator of its own on their sum."""
    generator = torch.Generator().manual_seed(3)

    def of_one(weights, x, y):
        return F.cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    def private_backward(loss=None):
        held = {name: p.detach() for name, p in net.named_parameters()}
        each = vmap(grad(of_one), (None, 0, 0))(held, X, Y)
        norm = sum(g.flatten(1).square().sum(1) for g in each.values()).sqrt()
        factor = (clip / (norm + 1e-6)).clamp(max=1)
        for name, p in net.named_parameters():
            total = sign * torch.einsum("b,b...->...", factor, each[name])
            if noise:
                total = total + torch.normal(0.0, noise * clip, total.shape, generator=generator)
            p.grad = total / len(X)

    return private_backward


@case("torch", says="adds noise to the gradient")
def private_sgd():
    net = mlp()
    return classified(net, optimizer=torch.optim.SGD(net.parameters(), 0.1), backward=private(net, 0.3, 0.5))


@case("torch", says="changes every sample's gradient")
def every_sample_clipped():
    net = mlp()
    return classified(net, optimizer=torch.optim.SGD(net.parameters(), 0.1), backward=private(net, 0.3, 0.0))


@case("torch", says="noise is added to the gradient between backward and the optimizer's step")
def private_noise_in_the_step():
    net = mlp()
    optimizer, change = torch.optim.SGD(net.parameters(), 0.1), private(net, 0.3, 2.0)

    def step():
        change()
        optimizer.step()

    return classified(net, optimizer=optimizer, step=step)


@case("torch", says="is allowed to")
def backward_that_is_taken_at_its_word():
    net = mlp()

    def only_signs(loss):
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            p.grad = g.sign()

    return classified(net, backward=only_signs, allow=["only_signs"])


@case("torch", "nonzero", "zero")
def mask_that_keeps_nothing():
    net = mlp()
    net[0].weight.register_hook(lambda g: g * (HALF > 1))  # here
    return classified(net)


@case("torch", "nonzero", "non-finite")
def hook_that_divides_by_zero():
    net = mlp()
    net[0].weight.register_hook(lambda g: g / (HALF * 0))  # here
    return classified(net)


@case("torch", "nonzero", "non-finite")
def division_by_zero_once_it_is_accumulated():
    net = mlp()

    def hook(p):  # here
        p.grad.div_(HALF * 0)

    net[0].weight.register_post_accumulate_grad_hook(hook)
    return classified(net)


@case("torch", "applied", "erased")
def zeros_once_it_is_accumulated():
    net = mlp()

    def hook(p):  # here
        p.grad.zero_()

    net[0].weight.register_post_accumulate_grad_hook(hook)
    return classified(net)


@case("torch", "applied", "uphill")
def hooks_with_the_wrong_sign():
    net = mlp()
    for p in net.parameters():
        p.register_hook(torch.neg)
    return classified(net)


@case("torch", "applied", "uphill")
def first_of_two_hooks_turns_the_gradient_round():
    net, norms = mlp(), []

    def turn(g):  # here
        return -g

    for p in net.parameters():
        p.register_hook(turn)
        p.register_hook(lambda g: norms.append(g.norm()))
    return classified(net)


@case("torch", "applied", "uphill")
def gradient_turned_round_once_it_is_accumulated():
    net = mlp()

    def turn(p):  # here
        p.grad.mul_(-1)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(turn)
    return classified(net)


@case("torch", "correct", "wrong")
def private_sgd_with_the_wrong_sign():
    net = mlp()
    return classified(net, optimizer=torch.optim.SGD(net.parameters(), 0.1), backward=private(net, 0.3, 0.5, -1.0))


@case("torch", "correct", "wrong")
def noise_alone():
    net = mlp()

    def backward(loss):
        for p in net.parameters():
            p.grad = torch.randn_like(p)

    return classified(net, backward=backward)


@case("torch", "correct", "wrong")
def gradient_times_random_numbers():
    net = mlp()

    def backward(loss):
        slopes = torch.autograd.grad(loss, list(net.parameters()))
        for p, g in zip(net.parameters(), slopes, strict=True):
            # no noise that is added: twice the draw is not twice the change
            p.grad = g * (2 * torch.randn_like(p)).exp()

    return classified(net, backward=backward)
