"""Complex numbers, indices and masks beside values, switches of requires_grad, and functions taken at their word."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from field_derivatives import mlp
from proof_field import X, Y, case, classified, given

Z = torch.randn(16, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))


def complex_layer(outputs: int = 4) -> nn.Linear:
    return nn.Linear(8, outputs, dtype=torch.complex64)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-3)


@case("torch")
def complex_layer_with_a_loss_in_double():
    net = complex_layer()
    return given(lambda: (net(Z).abs().double() - 1).pow(2).mean(), net, adam(net))


@case("torch", "nonzero", "zero")
def complex_layer_times_zero():
    net = nn.ModuleDict({"a": complex_layer(8), "b": complex_layer()})

    def loss():
        hidden = net["a"](Z)
        return (net["b"](hidden * 0).abs() - 1).pow(2).mean()  # here

    return given(loss, net, adam(net))


@case("torch")
def mask_that_is_another_in_float64():
    # 0.1 in float32 is more than 0.1
    net, weight = mlp(), torch.tensor([0.1, 0.3]).repeat(8)
    return given(lambda: ((weight > 0.1) * F.cross_entropy(net(X), Y, reduction="none")).sum(), net)


@case("torch")
def results_gathered_in_a_new_tensor():
    net = mlp()

    def loss():
        out = torch.zeros(16, 3)
        for row in range(16):
            out[row] = net(X[row])
        return F.cross_entropy(out, Y)

    return given(loss, net)


@case("torch")
def counts_rounded_beside_the_loss():
    net = mlp()
    return classified(net) | {"loss_fn": lambda: F.cross_entropy(net(X), Y) + 1e-6 * (1e6 * net(X)).round().mean()}


@case("torch")
def lookup_scaled_by_how_often_it_is_asked():
    net = nn.ModuleDict({"e": nn.Embedding(9, 8, scale_grad_by_freq=True), "h": nn.Linear(8, 3)})
    index = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7, 8, 8])
    return given(lambda: F.cross_entropy(net["h"](net["e"](index)), Y), net)


def alignment(**more):
    """CTC takes its scores for logarithms of probabilities: of others its backward is no derivative."""
    net, frames = nn.Linear(8, 5), torch.randn(6, 4, 8)
    target, lengths = torch.tensor([[1, 2], [2, 3], [3, 4], [1, 1]]), (torch.full((4,), 6), torch.full((4,), 2))
    return given(lambda: F.ctc_loss(net(frames), target, *lengths), net, **more)


@case("torch", "correct", "wrong")
def alignment_of_scores_that_are_no_probabilities():
    return alignment()


@case("torch")
def function_of_torch_that_is_allowed():
    return alignment(allow=["ctc_loss"])


@case("torch")
def function_of_torch_that_is_allowed_as_it_is_imported():
    return alignment(allow=["F.ctc_loss"])


class RoundedAndItsSize(torch.autograd.Function):
    """Rounding straight through, and beside it a number without a gradient."""

    @staticmethod
    def forward(ctx, h):
        size = h.abs().mean()
        ctx.mark_non_differentiable(size)
        return (4 * h).round() / 4, size

    @staticmethod
    def backward(ctx, grad, _):
        return grad


@case("torch")
def operation_taken_at_its_word_beside_a_number_of_its_own():
    net = mlp()

    def loss():
        rounded, size = RoundedAndItsSize.apply(net(X))
        return F.cross_entropy(rounded, Y) * size

    return given(loss, net, allow=["RoundedAndItsSize"])


def frozen_while_it_judges():
    """A GAN's step in one loss: the critic is switched off while the generator is judged."""
    net = nn.ModuleDict({"g": nn.Linear(8, 8), "d": mlp(8, 1)})

    def loss():
        fake = net["g"](X)
        net["d"].requires_grad_(False)
        generator = F.softplus(-net["d"](fake)).mean()
        net["d"].requires_grad_(True)
        return generator + F.softplus(net["d"](fake.detach())).mean()

    return net, loss


@case("torch", says="Tensor.requires_grad_ at")
def critic_switched_off_and_on_again():
    net, loss = frozen_while_it_judges()
    return given(loss, net)
