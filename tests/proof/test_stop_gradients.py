"""A gradient stopped on purpose beside a way that connects is a note, however much of it would flow the other way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qwen_fused as qf
from qwen_fused.proof.gradient_error import settle

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))


def mlp(inputs: int = 6, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def q_learning():
    net = mlp()

    def loss():
        with torch.no_grad():
            target = 1 + 0.9 * net(X.roll(1, 0)).max(1).values
        return F.mse_loss(net(X).gather(1, Y[:, None])[:, 0], target)

    return net, loss


def siamese():
    net = nn.ModuleDict({"encoder": mlp(6, 8), "predictor": mlp(8, 8)})

    def loss():
        one, other = net.encoder(X), net.encoder(X + 0.1 * X.roll(1, 0))
        there = F.cosine_similarity(net.predictor(one), other.detach()).mean()
        return -(there + F.cosine_similarity(net.predictor(other), one.detach()).mean())

    return net, loss


def codebook():
    net = nn.ModuleDict({"encoder": mlp(6, 4), "codes": nn.Embedding(8, 4), "decoder": mlp(4, 6)})

    def loss():
        z = net.encoder(X)
        code = net.codes(torch.cdist(z, net.codes.weight).argmin(1))
        through = z + (code - z).detach()
        return F.mse_loss(net.decoder(through), X) + F.mse_loss(code, z.detach()) + F.mse_loss(z, code.detach()) / 4

    return net, loss


def actor_critic():
    net = nn.ModuleDict({"body": mlp(6, 8), "policy": nn.Linear(8, 3), "value": nn.Linear(8, 1)})

    def loss():
        hidden = net.body(X)
        value = net.value(hidden)[:, 0]
        chosen = torch.distributions.Categorical(logits=net.policy(hidden)).log_prob(Y)
        return -(chosen * (Y - value).detach()).mean() + F.mse_loss(value, Y.float())

    return net, loss


@pytest.mark.parametrize("make", [q_learning, siamese, codebook, actor_critic], ids=lambda make: make.__name__)
def test_is_proved_with_a_note(make) -> None:
    torch.manual_seed(0)
    net, loss = make()
    report = qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3))
    assert report.verdict == "proved", report
    assert any("detach" in note or "no_grad" in note for note in report.notes), report


def test_headline_tells_what_the_cut_takes() -> None:
    torch.manual_seed(0)
    net, loss = q_learning()
    report = qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3))
    (cut,) = report.partial_cuts
    assert report.ok and report.verdict == "proved" and 0.1 < cut.share <= 1
    assert report.headline.startswith(f"proved, with a cut: torch.no_grad at {cut.frame} takes {cut.share:.0%}"), report
    assert str(report).startswith("gradient " + report.headline)
    assert any(f"it takes {cut.share:.0%} of the gradient" in note for note in report.notes), report.notes
    assert report.to_dict()["partial_cuts"][0]["share"] == cut.share


def test_sample_in_place_of_rsample_is_told() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"encoder": mlp(6, 8), "decoder": mlp(4, 6)})

    def loss():
        mean, log_variance = net.encoder(X).chunk(2, -1)
        code = torch.distributions.Normal(mean, (log_variance / 2).exp()).sample()
        return F.mse_loss(net.decoder(code), X) + 1e-3 * (mean.pow(2) + log_variance.exp() - log_variance).mean()

    report = qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3))
    assert report.ok and "proved, with a cut: torch.no_grad" in report.headline, report
    (cut,) = report.partial_cuts
    assert cut.share > 0.3 and all(name.startswith("encoder") for name in cut.parameters), cut


def branch_at_right_angles(net):
    # the gradient that is lost has nothing to do with the one that is left
    h = net.body(X)
    return F.cross_entropy(net.one(h), Y) + F.mse_loss(net.other(h.detach()), 3 * X.roll(1, 0))


def penalty_by_item(net):
    h = net.body(X)
    return F.cross_entropy(net.one(h), Y) + F.mse_loss(net.other(h), X) + 9 * h.square().mean().item()


def hidden_through_numpy(net):
    h = net.body(X)
    h = 0.1 * h + torch.from_numpy(3 * h.detach().numpy())
    return F.cross_entropy(net.one(h), Y) + F.mse_loss(net.other(h), X)


def fifth_of_five(net):
    h = net.body(X)
    one = F.cross_entropy(net.one(h + 0 * h.detach()), Y)
    one = one + 0 * F.cross_entropy(net.one(h.detach()), Y)
    one = one + 0 * F.mse_loss(net.other(h.detach()), X)
    one = one + 0 * h.detach().sum()
    return one + F.mse_loss(net.other(0.01 * h + h.detach()), 3 * X)


def in_float32_alone(net):
    h = net.body(X)
    if h.dtype != torch.float32:
        raise RuntimeError("this kernel has no float64")
    return F.cross_entropy(net.one(0.01 * h + h.detach()), Y) + 1e-3 * F.mse_loss(net.other(h), X)


@pytest.mark.parametrize(
    "loss",
    [branch_at_right_angles, penalty_by_item, hidden_through_numpy, fifth_of_five, in_float32_alone],
    ids=lambda loss: loss.__name__,
)
def test_no_bare_proved_where_most_is_lost(loss) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": mlp(6, 64), "one": mlp(64, 3), "other": mlp(64, 6)})
    report = qf.prove(lambda: loss(net), net, torch.optim.Adam(net.parameters(), 1e-3))
    assert report.ok and report.headline.startswith("proved, with a cut: Tensor."), report
    assert max(cut.share for cut in report.partial_cuts) > 0.4, report.partial_cuts


def test_share_that_can_not_be_measured_is_told() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": mlp(6, 64), "head": mlp(64, 3)})

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = net.body(X)
            if h.dtype != torch.bfloat16:
                raise RuntimeError("this kernel has no float64")
            return F.cross_entropy(net.head(0.5 * h + 0.5 * h.detach()), Y)

    report = qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3))
    assert "takes an unknown share of the gradient of body.0.weight" in report.headline, report
    assert any("can't be measured: this kernel has no float64" in note for note in report.notes), report.notes


def test_allowed_cut_is_not_in_the_headline() -> None:
    torch.manual_seed(0)
    net, loss = q_learning()
    report = qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3), allow=["torch.no_grad"])
    assert report.headline == "proved" and not report.partial_cuts and not report.notes, report


def test_script_does_not_know_the_share(prove_text) -> None:
    run, line = prove_text("""
        net = nn.Linear(6, 3)
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x) + net(x).detach(), y)  # here
            loss.backward()
            optimizer.step()
    """)
    assert run.report.ok and f"train.py:{line} in" in run.report.headline, run.report
    assert "takes an unknown share of the gradient" in run.report.headline


def test_training_loop_is_warned_of_the_cut(caplog) -> None:
    torch.manual_seed(0)
    net, loss = q_learning()
    with caplog.at_level("WARNING", "qwen_fused"):
        settle(qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3)), only_warn=False)
    (record,) = caplog.records
    assert "proved, with a cut: torch.no_grad" in record.message and "\n" not in record.message


def test_straight_through_takes_nothing_away() -> None:
    torch.manual_seed(0)
    net = mlp()

    def loss():
        hidden = torch.tanh(net[0](X))
        return F.cross_entropy(net[2](hidden + (hidden.sign() - hidden).detach()), Y)

    report = qf.prove(loss, net, torch.optim.Adam(net.parameters(), 1e-3))
    # without the cut the first layer has no gradient at all
    assert report.headline == "proved" and len(report.notes) == 1, report
