"""Gradients stopped on purpose beside a way that connects, as healthy loops stop them; and lost there by accident."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from field_derivatives import mlp
from proof_field import X, Y, adamw, case, given

OTHER = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
REWARD = OTHER[:, 0]


def parts(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


def chosen(net: nn.Module, x=X):
    return net(x).log_softmax(1).gather(1, Y[:, None])[:, 0]


def trained(net: nn.Module, loss, *trained_parts: nn.Module):
    """For loops that hold more than they train."""
    return given(loss, net, torch.optim.AdamW([p for part in trained_parts for p in part.parameters()], 1e-3))


@case("torch")
def target_network_and_the_online_argmax():
    net = mlp()
    target = copy.deepcopy(net).requires_grad_(False)

    def loss():
        with torch.no_grad():
            action = net(X.roll(1, 0)).argmax(1, keepdim=True)
            y = REWARD + 0.9 * target(X.roll(1, 0)).gather(1, action)[:, 0]
        return F.smooth_l1_loss(net(X).gather(1, Y[:, None])[:, 0], y)

    return given(loss, net)


@case("torch")
def discriminator_sees_a_detached_fake():
    net = parts(generator=mlp(8, 8), critic=mlp(8, 1))
    net.generator.requires_grad_(False)

    def loss():
        real, fake = net.critic(OTHER), net.critic(net.generator(X).detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    return trained(net, loss, net.critic)


@case("torch", says="of the gradient")
def both_players_in_one_loss():
    net = parts(generator=mlp(8, 8), critic=mlp(8, 1))

    def loss():
        fake = net.generator(X)
        held = {name: p.detach() for name, p in net.critic.named_parameters()}
        fooled = F.softplus(-torch.func.functional_call(net.critic, held, (fake,))).mean()
        return F.softplus(-net.critic(OTHER)).mean() + F.softplus(net.critic(fake.detach())).mean() + fooled

    return given(loss, net)


@case("torch")
def slow_teacher_moved_in_the_loss():
    net = parts(online=mlp(8, 8), predictor=mlp(8, 8))
    teacher = copy.deepcopy(net.online).requires_grad_(False)

    def loss():
        with torch.no_grad():
            there = teacher(OTHER)
            for slow, fast in zip(teacher.parameters(), net.online.parameters(), strict=True):
                slow.mul_(0.99).add_(fast, alpha=0.01)
        return -F.cosine_similarity(net.predictor(net.online(X)), there).mean()

    return given(loss, parts(net=net, teacher=teacher), adamw(net))


@case("torch", says="of the gradient")
def clipped_surrogate_with_old_log_probabilities():
    net = parts(policy=mlp(), value=mlp(8, 1))

    def loss():
        with torch.no_grad():
            old, advantage = chosen(net.policy), REWARD - net.value(X)[:, 0]
        ratio = (chosen(net.policy) - old).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return F.mse_loss(net.value(X)[:, 0], REWARD) - surrogate

    return given(loss, net)


@case("torch")
def preferences_against_a_reference():
    net = mlp()
    reference = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        net[0].weight.add_(0.05)

    def loss():
        with torch.no_grad():
            anchor = chosen(reference) - chosen(reference, OTHER)
        return -F.logsigmoid(0.1 * (chosen(net) - chosen(net, OTHER) - anchor)).mean()

    return given(loss, net)


@case("torch")
def student_of_a_teacher_in_the_same_module():
    net = parts(student=mlp(), teacher=mlp())
    net.teacher.requires_grad_(False)

    def loss():
        with torch.no_grad():
            soft = net.teacher(X).softmax(1)
        return F.kl_div(net.student(X).log_softmax(1), soft, reduction="batchmean")

    return trained(net, loss, net.student)


@case("torch", says="of the gradient")
def consistency_with_sharpened_targets():
    net = mlp()

    def loss():
        with torch.no_grad():
            soft = (net(X) / 0.4).softmax(1)
        return F.cross_entropy(net(OTHER), Y) + F.kl_div(net(X + 0.3 * OTHER).log_softmax(1), soft, reduction="sum")

    return given(loss, net)


@case("torch", says="of the gradient")
def focal_weight_that_is_detached():
    net = mlp()
    return given(lambda: -((1 - chosen(net).exp()).detach() ** 2 * chosen(net)).mean(), net)


@case("torch", says="of the gradient")
def losses_balanced_by_their_own_size():
    net = parts(body=mlp(8, 8), one=nn.Linear(8, 3), other=nn.Linear(8, 8))

    def loss():
        h = net.body(X)
        one, other = F.cross_entropy(net.one(h), Y), F.mse_loss(net.other(h), OTHER)
        return one + other * (one.item() / other.item())

    return given(loss, net)


@case("torch", says="of the gradient")
def truncated_backpropagation_through_time():
    net = parts(cell=nn.GRUCell(8, 8), out=nn.Linear(8, 8))

    def loss():
        h, total = torch.zeros(4, 8), torch.zeros(())
        for x, y in zip(X.split(4), OTHER.split(4), strict=True):
            h = net.cell(x, h.detach())
            total = total + F.mse_loss(net.out(h), y)
        return total

    return given(loss, net)


@case("torch", says="of the gradient")
def refinement_from_points_that_are_detached():
    net = mlp(16, 8)

    def loss():
        point, total = torch.zeros(16, 8), torch.zeros(())
        for _ in range(3):
            point = point.detach() + net(torch.cat([X, point.detach()], 1))
            total = total + F.l1_loss(point, OTHER)
        return total

    return given(loss, net)


@case("torch", says="of the gradient")
def responsibilities_of_a_mixture():
    mixture = nn.ParameterDict({"mean": torch.randn(3, 8), "log_scale": torch.zeros(3)})

    def loss():
        square = (X[:, None] - mixture["mean"]).square().sum(-1)
        log_p = -square / 2 / (2 * mixture["log_scale"]).exp() - 8 * mixture["log_scale"]
        with torch.no_grad():
            share = log_p.softmax(1)
        return -(share * log_p).sum(1).mean()

    return given(loss, mixture)


@case("torch", says="it takes 0% of the gradient")
def maximum_taken_off_before_exp():
    net = mlp()

    def loss():
        z = net(X)
        most = z.max(1, keepdim=True).values.detach()
        return ((z - most).exp().sum(1).log() + most[:, 0] - z.gather(1, Y[:, None])[:, 0]).mean()

    return given(loss, net)


@case("torch", says="it takes 0% of the gradient")
def reward_that_numpy_computes():
    net = mlp(8, 2)

    def loss():
        policy = torch.distributions.Normal(net(X), 0.3)
        action = policy.sample()
        reward = torch.from_numpy(-(action.numpy() ** 2).sum(1))
        return -(policy.log_prob(action).sum(1) * (reward - reward.mean())).mean()

    return given(loss, net)


@case("torch")
def weights_rounded_straight_through():
    net = mlp()

    def rounded(weight):
        return weight + ((weight * 8).round() / 8 - weight).detach()

    def loss():
        h = torch.tanh(F.linear(X, rounded(net[0].weight), net[0].bias))
        return F.cross_entropy(F.linear(h, rounded(net[2].weight), net[2].bias), Y)

    return given(loss, net)


@case("torch", "connected", "partial cut")
def penalty_on_a_slope_without_a_graph():
    net = mlp(8, 1)

    def loss():
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x)  # here
        return net(X).mean() - net(OTHER).mean() + 10 * (slope.norm(dim=1) - 1).pow(2).mean()

    return given(loss, net)


@case("torch", "connected", "partial cut")
def sum_of_losses_copied_into_a_new_tensor():
    net = parts(body=mlp(8, 8), one=nn.Linear(8, 3), other=nn.Linear(8, 8))

    def loss():
        h = net.body(X)
        one, other = F.cross_entropy(net.one(h), Y), F.mse_loss(net.other(h), OTHER)
        return torch.tensor([one, other]).sum() + 0.1 * one + 0.1 * other  # here

    return given(loss, net)


@case("torch", "connected", "partial cut")
def features_copied_beside_a_penalty():
    net = parts(body=mlp(8, 8), head=nn.Linear(8, 3))

    def loss():
        h = net.body(X)
        return F.cross_entropy(net.head(torch.tensor(h)), Y) + 0.01 * h.square().mean()  # here

    return given(loss, net)
