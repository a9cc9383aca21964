"""One gradient that is made longer on its way to the optimizer is told with its line; what healthy loops do is not."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn
from proof_cases import Pair, marked, only_finding, proof


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def doubled_in_backward(model, optimizer):
    def backward(loss):
        loss.backward()
        model.head.weight.grad.mul_(2)  # here

    return backward, {"backward": backward}


def doubled_in_the_step(model, optimizer):
    def step():
        model.head.weight.grad = 2 * model.head.weight.grad  # here
        nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()

    return step, {"step": step}


def doubled_after_accumulation(model, optimizer):
    def backward(loss):
        for part in (0.25, 0.75):
            (part * loss).backward(retain_graph=True)
        for p in model.parameters():
            p.grad /= 4
        model.head.weight.grad *= 8  # here

    return backward, {"backward": backward}


def doubled_of_a_loss_made_smaller(model, optimizer):
    def backward(loss):
        (loss / 4).backward()
        model.head.weight.grad *= 2  # here

    return backward, {"backward": backward}


ONE = [doubled_in_backward, doubled_in_the_step, doubled_after_accumulation, doubled_of_a_loss_made_smaller]


@pytest.mark.parametrize("change", ONE, ids=lambda change: change.__name__)
def test_one_gradient_is_told_with_its_factor_and_line(change) -> None:
    model = Pair()
    optimizer = sgd(model)
    function, given = change(model, optimizer)
    report = proof(model, optimizer, **given)
    assert report.ok and report.enlarged.parameters == ("head.weight",), report
    assert report.headline.startswith("proved, with a change: the gradient of head.weight is made 2 times as long at")
    assert report.enlarged.frame.line == marked(function) and report.headline.partition(", ")[2] in str(report)
    assert any("head.weight is made 2 times as long" in note for note in report.notes)
    assert json.loads(json.dumps(report.to_dict()))["enlarged"]["factor"] == pytest.approx(2, rel=1e-3)


def test_one_gradient_that_is_still_scaled_is_named() -> None:
    model = Pair()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (model.encoder, model.head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step():
        scaler.unscale_(optimizers[0])
        for optimizer in optimizers:
            optimizer.step()

    report = proof(model, optimizers, backward=lambda loss: scaler.scale(loss).backward(), step=step)
    assert only_finding(report, "applied", "still scaled").parameters == ("head.weight", "head.bias")


def test_optimizer_that_takes_the_scale_off_by_itself() -> None:
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    given = {"backward": lambda loss: scaler.scale(loss).backward(), "step": lambda: scaler.step(optimizer)}
    assert proof(model, optimizer, **given).headline == "proved"


def clipped_by_group(model):
    for part in (model.encoder, model.head):
        nn.utils.clip_grad_norm_(part.parameters(), 0.01 if part is model.encoder else 1e3)


def clipped_but_one(model):
    nn.utils.clip_grad_norm_([*model.encoder.parameters(), model.head.bias], 0.01)


def clipped_one_by_one(model):
    for p in model.parameters():
        nn.utils.clip_grad_norm_([p], 0.05)


def clipped_by_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 0.02)


def all_doubled(model):
    for p in model.parameters():
        p.grad.mul_(2)


def all_normalised(model):
    for p in model.parameters():
        p.grad.div_(p.grad.norm())


def noise_added(model):
    for p in model.parameters():
        p.grad.add_(0.1 * p.grad.norm() * torch.randn_like(p))


CHANGES = [
    clipped_by_group,
    clipped_but_one,
    clipped_one_by_one,
    clipped_by_value,
    all_doubled,
    all_normalised,
    noise_added,
]


@pytest.mark.parametrize("where", ["backward", "step"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_healthy_loops_do_is_not_told(change, where) -> None:
    model = Pair()
    optimizer = sgd(model)

    def backward(loss):
        loss.backward()
        if where == "backward":
            change(model)

    def step():
        if where == "step":
            change(model)
        optimizer.step()

    report = proof(model, optimizer, backward=backward, step=step)
    assert report.headline == "proved" and report.enlarged is None, report


def test_two_optimizers_one_of_them_clipped_after_unscaling() -> None:
    model = Pair()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (model.encoder, model.head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step():
        scaler.unscale_(optimizers[0])
        nn.utils.clip_grad_norm_(model.encoder.parameters(), 0.01)
        for optimizer in optimizers:
            scaler.step(optimizer)

    report = proof(model, optimizers, backward=lambda loss: scaler.scale(loss).backward(), step=step)
    assert report.headline == "proved", report


@pytest.mark.parametrize("entry", ["head.weight", "faster_head"])
def test_what_is_allowed_is_not_told(entry) -> None:
    model = Pair()

    def faster_head(loss):
        loss.backward()
        model.head.weight.grad.mul_(2)

    report = proof(model, sgd(model), backward=faster_head, allow=[entry])
    assert report.headline == "proved" and report.notes == [] and report.allowed[entry] > 0, report


@pytest.mark.parametrize("other", ["looks", "halves"])
def test_hook_that_changes_a_gradient_is_told_from_one_beside_it(other) -> None:
    model = Pair()
    first = lambda grad: None if other == "looks" else grad / 2  # noqa: E731
    second = lambda grad: 3 * grad  # noqa: E731
    for hook in (second, first) if other == "looks" else (first, second):
        model.head.weight.register_hook(hook)
    (note,) = proof(model).notes
    blamed = second if other == "looks" else first
    assert f":{blamed.__code__.co_firstlineno} in" in note and "head.weight" in note
