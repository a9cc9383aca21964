"""Gradients that are no longer those that were measured: clip_ refuses to scale them by the norm of what was there."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from qwen_fused.norms import group_grad_norm as module
from qwen_fused.norms.group_grad_norm import GroupGradNorm

pytestmark = pytest.mark.skipif(module.COMPILED is None, reason="the extension is not here, or older")


def made() -> tuple[nn.Linear, GroupGradNorm]:
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    return layer, GroupGradNorm({"other": [nn.Parameter(torch.ones(1))], "layer": layer})


def again(layer: nn.Linear) -> None:
    layer.zero_grad(set_to_none=True)
    gc.collect()
    layer(torch.full((1, 3), 100.0)).sum().backward()


CHANGES = {
    "accumulated": lambda layer: layer(torch.ones(1, 3)).sum().backward(),
    "another backward": again,
    "replaced": lambda layer: setattr(layer.weight, "grad", torch.ones(2, 3)),
    "written to": lambda layer: layer.weight.grad.mul_(2),
    "written to by a view": lambda layer: layer.weight.grad[0].zero_(),
    "clipped by torch": lambda layer: nn.utils.clip_grad_norm_(layer.parameters(), 0.1),
    "one that was not there": lambda layer: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_is_refused(change):
    layer, norms = made()
    if change == "one that was not there":
        kept, layer.weight.grad = layer.weight.grad, None
    stats = norms.measure()
    CHANGES[change](layer)
    if change == "one that was not there":
        layer.weight.grad = kept
    before = [p.grad.clone() for p in layer.parameters()]
    with pytest.raises(RuntimeError, match="stats must be measured anew: the gradient of weight of group layer is"):
        norms.clip_(stats, 0.1)
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), before, strict=True))
    norms.clip_(norms.measure(), 0.1)


def test_every_loop_without_memory_of_the_last_is_noticed():
    """New gradients mostly lie where the old ones were: an address alone says nothing."""
    layer, norms = made()
    for _ in range(20):
        stats = norms.measure()
        again(layer)
        with pytest.raises(RuntimeError, match="measured anew"):
            norms.clip_(stats, 0.1)


def test_what_is_gone_is_left_out():
    layer, norms = made()
    stats = norms.measure()
    layer.bias.grad = None
    norms.clip_(stats, 0.1)
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 3), 0.1 / 8**0.5), rtol=1e-4, atol=0)


def test_reads_change_nothing():
    layer, norms = made()
    stats = norms.measure()
    norms.measure(0.5)
    copy.deepcopy(layer), layer.weight.grad.sum(), stats.to_dict()
    norms.clip_(stats, 0.1)


def test_stats_keep_no_gradient_alive_and_can_be_pickled():
    layer, norms = made()
    stats = norms.measure()
    grad = weakref.ref(layer.weight.grad)
    layer.zero_grad(set_to_none=True)
    gc.collect()
    assert grad() is None
    assert pickle.loads(pickle.dumps(stats)).to_dict() == copy.deepcopy(stats).to_dict() == stats.to_dict()


def test_lists_are_what_they_should_be():
    remember, changed = module.COMPILED.remember_gradients, module.COMPILED.first_changed_gradient
    capsule = remember([torch.ones(1), torch.ones(1)])
    with pytest.raises(ValueError, match="as many as measured"):
        changed(capsule, [torch.ones(1)])
    with pytest.raises(TypeError, match="must be tensors, got int"):
        changed(capsule, [1, 2])
    with pytest.raises(TypeError, match="must be a list, got tuple"):
        remember((torch.ones(1),))
    with pytest.raises(ValueError, match="PyCapsule"):
        changed(object(), [])
