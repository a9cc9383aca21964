"""What a group may be: tied weights are found by the tensor, names don't collide, and used-up iterators show."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import parameter
from torch import nn

from qwen_fused.norms.group_grad_norm import GroupGradNorm
from qwen_fused.norms.stats import nonfinite_message


class LanguageModel(nn.Module):
    """An embedding and a head that are one weight, as in every small Qwen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20, bias=False)
        self.head.weight = self.embed.weight
        for p in self.parameters():
            p.grad = torch.full_like(p, 3.0)


TIED = {
    "modules": lambda m: {"embed": m.embed, "body": m.body, "head": m.head},
    "one module twice": lambda m: {"a": m.embed, "b": m.embed},
    "named": lambda m: {"a": m.embed.named_parameters(), "b": m.head.named_parameters()},
    "lists": lambda m: {"a": m.embed.parameters(), "b": m.head.parameters()},
    "a level up": lambda m: {"a": nn.ModuleList([m.embed]), "b": nn.ModuleList([m.head])},
    "parts of one group": lambda m: {"qwen": {"embed": m.embed, "head": m.head}},
    "a part and a group": lambda m: {"qwen": {"embed": m.embed}, "head": m.head},
    "one list": lambda m: {"a": [m.embed.weight, m.head.weight]},
}


@pytest.mark.parametrize("case", TIED)
def test_a_parameter_in_two_places_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"each parameter must be in one group once, .* tied=\"first\""):
        GroupGradNorm(TIED[case](LanguageModel()))


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_count_in_the_first(gradient_path: str, case: str) -> None:
    model = LanguageModel()
    norms = GroupGradNorm(TIED[case](model), tied="first")
    assert sum(p is model.embed.weight for p in norms.parameters) == 1
    stats = norms.measure()
    held = torch.stack([p.grad.square().sum() for p in norms.parameters]).sum().sqrt()
    torch.testing.assert_close(torch.linalg.vector_norm(stats.norm), held)
    norms.clip_(stats, 1.0)
    # clipped once: alone in its group, or beside what shares it
    assert float(model.embed.weight.grad.norm()) == pytest.approx(1.0, rel=1e-5)


def test_tied_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="tied must be one of refuse, first, got 'last'"):
        GroupGradNorm({}, tied="last")


@pytest.mark.parametrize("order", [0, 1])
def test_a_group_named_as_another_groups_part(order: int) -> None:
    groups = [("a", {"b": [parameter(torch.ones(1))]}), ("a/b", [parameter(torch.ones(1))])]
    with pytest.raises(ValueError, match="groups and parts must differ in name, got a/b"):
        GroupGradNorm(dict(groups[::-1] if order else groups))


def test_a_bad_group_is_told_whatever_its_name() -> None:
    fine, bad = parameter(torch.ones(1)), parameter(torch.tensor([float("nan")]))
    report = GroupGradNorm({"a": [fine], "a/b": [bad]}).measure().to_dict()
    assert nonfinite_message(report) == "the gradient is not finite: 1 NaN or Inf in group a/b, first in a/b[0]"


def used_up(members):
    for _ in members:
        pass
    return members


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: iter(list(m.parameters())),
        lambda m: filter(lambda p: p.requires_grad, m.parameters()),
    ],
)
@pytest.mark.parametrize("part", [False, True])
def test_an_iterator_that_was_read_before(make, part: bool) -> None:
    layer = nn.Linear(2, 2)
    members = used_up(make(layer))
    with pytest.raises(ValueError, match="must be a list of parameters, got a .* gives none: it has been read before"):
        GroupGradNorm({"a": {"b": members} if part else members})
    assert len(GroupGradNorm({"a": make(layer)}).parameters) == 2


def test_one_generator_for_two_groups() -> None:
    members = nn.Linear(2, 2).parameters()
    with pytest.raises(ValueError, match="group b must be .* read before"):
        GroupGradNorm({"a": members, "b": members})


def test_nothing_is_no_error_where_nothing_is_meant() -> None:
    norms = GroupGradNorm({"none": nn.ReLU().parameters(), "empty": [], "module": nn.ReLU()})
    assert norms.measure().norm.tolist() == [0.0] * 3


def test_what_is_computed_keeps_no_gradient() -> None:
    weight = nn.Parameter(torch.ones(3))
    twice = weight * 2
    with pytest.raises(ValueError, match=r"group a must hold parameters, got a\[0\], which is computed from others"):
        GroupGradNorm({"a": [twice]})
    twice.retain_grad()
    twice.square().sum().backward()
    assert GroupGradNorm({"a": [twice]}).measure().norm[0] == pytest.approx(48**0.5)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_parameters_left_on_the_meta_device(gradient_path: str, how: str) -> None:
    """The model has others in their place; beside what has a gradient, and alone."""
    with torch.device("meta"):
        layer = nn.Linear(2, 1)
    other = parameter(torch.tensor([3.0]))
    both, alone = GroupGradNorm({"a": layer, "b": [other]}), GroupGradNorm({"a": layer})
    if how == "assign":
        layer.load_state_dict(nn.Linear(2, 1).state_dict(), assign=True)
    layer.to_empty(device="cpu")(torch.ones(1, 2)).sum().backward()
    for norms in (both, alone):
        with pytest.raises(ValueError, match="groups must hold parameters that have memory, got some on the meta"):
            norms.measure()
