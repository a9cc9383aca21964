"""The trace follows values, not autograd: what it calls lost, alive, left, stale or fresh, and where."""

from __future__ import annotations

import inspect
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qwen_fused.proof.frames import boundary, locate
from qwen_fused.proof.trace import trace

A, B = nn.Parameter(torch.ones(4)), nn.Parameter(torch.full((4,), 2.0))


def follow(loss_fn, **more):
    return trace(loss_fn, {"a": A, "b": B, **more})


def reached(found):
    """Parameters that the loss's values depend on, and those that autograd connects it to."""
    labels = found.labels
    return labels.names_of(labels.values(found.loss)), labels.names_of(labels.alive(found.loss))


def cuts(found):
    return [(event.kind, found.labels.names_of(event.lost)) for event in found.reaching]


def here(function, mark="# here"):
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    (place,) = [i for i, line in enumerate(lines) if mark in line]
    return first + place


def test_values_and_graph_agree_where_nothing_is_cut():
    found = follow(lambda: (A * B).relu().sum())
    assert reached(found) == (("a", "b"), ("a", "b")) and cuts(found) == [] and found.departures == []


def test_one_parameter_cut_beside_another():
    found = follow(lambda: (A.detach() * B).sum())
    assert reached(found) == (("a", "b"), ("b",)) and cuts(found) == [("detach", ("a",))]


def test_cut_whose_result_is_not_used_does_not_reach():
    def loss():
        shown = A.detach().mean()  # for show
        assert float(shown) == 1.0
        return A.sum()

    found = follow(loss)
    assert cuts(found) == [] and [event.kind for event in found.cuts] == ["detach"]
    assert [event.kind for event in found.departures] == ["item"]


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.view(2, 2).flatten(),
        lambda t: t[:2].repeat(2),
        lambda t: torch.stack(t.unbind()),
        lambda t: torch.cat(t.chunk(2)),
        lambda t: t.T,
        lambda t: t[None].expand(3, 4).sum(0),
        lambda t: torch.vmap(lambda v: v * 2)(t),
    ],
)
def test_views_of_a_cut_tensor_stay_cut(view):
    found = follow(lambda: (view((A * 3).detach()) + B).sum())
    assert reached(found) == (("a", "b"), ("b",)) and cuts(found) == [("detach", ("a",))]


def test_in_place_writes_carry_values():
    def loss():
        kept = torch.zeros(2, 4)
        kept[0] = A * 2
        kept[1].copy_(B.detach())
        return kept.sum()

    found = follow(loss)
    assert reached(found) == (("a", "b"), ("a",)) and cuts(found) == [("detach", ("b",))]


def test_write_through_a_detached_alias_is_noted():
    def loss():
        h = torch.sigmoid(A)
        h.data.mul_(B.sum().item())
        return h.sum()

    found = follow(loss)
    assert [event.aliased for event in found.cuts if event.kind == "data"] == [True]


def test_no_grad_region_is_one_place_with_its_first_operation():
    def loss():
        with torch.no_grad():  # here
            h = A * 2
            h = h.exp()
        return (h * B).sum()

    found = follow(loss)
    (event,) = found.reaching
    assert (event.kind, event.site.user.line, event.at.line) == ("no_grad", here(loss), here(loss) + 1)


def test_nested_switches_name_the_outer_one():
    @torch.no_grad()  # here
    def outer():
        with torch.enable_grad(), torch.no_grad():
            inner = A * 2
        return inner + A * 3

    found = follow(lambda: (outer() + B).sum())
    lines = [event.site.user.line for event in found.reaching]
    # the inner block switched it off for the first operation, the decorator for the second
    assert lines == [here(outer) + 2, here(outer)] and found.reaching[1].kind == "decorated no_grad"


def test_operations_inside_a_custom_function_are_not_cuts():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.detach() + h

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    found = follow(lambda: Twice.apply(A).sum())
    assert reached(found) == (("a",), ("a",)) and cuts(found) == []
    assert [op.name for op in found.custom] == ["Twice"]


def test_functions_whose_apply_is_no_classmethod_of_python(monkeypatch):
    class ClassmethodOfC:  # as it is since torch 2.14
        def __init__(self, known):
            self.known = known

        def __get__(self, instance, owner):
            return self.known.__get__(instance, owner)

    class Negated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return -h

        @staticmethod
        def backward(ctx, grad):
            return -grad

    monkeypatch.setattr(torch.autograd.Function, "apply", ClassmethodOfC(torch.autograd.Function.__dict__["apply"]))
    found = follow(lambda: Negated.apply(A).sum())
    assert [op.name for op in found.custom] == ["Negated"]


def test_parameter_used_inside_a_custom_function_without_being_given():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h * B

        @staticmethod
        def backward(ctx, grad):
            return grad

    found = follow(lambda: Scaled.apply(A).sum())
    assert reached(found) == (("a", "b"), ("a",)) and cuts(found) == [("custom function", ("b",))]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_are_followed(reentrant):
    found = follow(lambda: checkpoint(lambda h: (h * B).exp(), A, use_reentrant=reentrant).sum())
    assert reached(found) == (("a", "b"), ("a", "b")) and cuts(found) == []


def test_reentrant_checkpoint_of_plain_inputs_is_a_cut():
    def loss():
        return checkpoint(lambda h: h * A, torch.ones(4), use_reentrant=True).sum()  # here

    found = follow(loss)
    assert cuts(found) == [("checkpoint", ("a",))] and found.reaching[0].site.user.line == here(loss)


def test_compiled_functions_run_their_source():
    compiled = torch.compile(lambda: (A.detach() * B).sum(), backend="eager")
    compiled()
    assert cuts(follow(compiled)) == [("detach", ("a",))]


def test_scripted_code_is_seen_through_values():
    scripted = torch.jit.script(nn.Linear(4, 2))
    parameters = {f"s.{name}": p for name, p in scripted.named_parameters()}
    found = follow(lambda: scripted(A).sum(), **parameters)
    assert reached(found) == (("a", "s.weight", "s.bias"),) * 2

    def hidden():
        with torch.no_grad():
            return scripted(A)

    found = follow(lambda: (hidden() * 2).sum(), **parameters)
    assert cuts(found) == [("unseen", ("a", "s.weight", "s.bias"))]


def test_custom_library_operations_are_listed():
    @torch.library.custom_op("qwen_fused_test::twice", mutates_args=())
    def twice(h: torch.Tensor) -> torch.Tensor:
        return h * 2

    twice.register_autograd(lambda ctx, grad: grad * 2)
    found = follow(lambda: twice(A).sum())
    assert reached(found) == (("a",), ("a",)) and "twice" in found.custom[0].name


@pytest.mark.parametrize(
    ("leave", "kind"),
    [
        (lambda t: t.sum().item(), "item"),
        (lambda t: float(t.sum()), "item"),
        (lambda t: int(t.sum()), "item"),
        (lambda t: t.tolist(), "tolist"),
        (lambda t: t.detach().numpy(), "numpy"),
        (lambda t: np.asarray(t.detach()), "numpy"),
        (lambda t: f"{t.sum():.2f}", "text"),
        (lambda t: 1 if (t > 0).all() else 0, "branch"),
    ],
)
def test_departures(leave, kind):
    def loss():
        leave(A * 1)
        return B.sum()

    found = follow(loss)
    assert [event.kind for event in found.departures] == [kind]
    assert reached(found) == (("b",), ("b",))


def test_shapes_and_factories_carry_no_values():
    def loss():
        h = A * 2
        like = torch.ones_like(h) + h.new_zeros(h.shape) + torch.zeros(h.size(0)).type_as(h)
        return (like * B).sum()

    assert reached(follow(loss)) == (("b",), ("b",))


def test_fresh_parameters_and_where_they_are_made():
    def loss():
        layer = nn.Linear(4, 4)  # here
        return layer(A).sum()

    found = follow(loss)
    assert {site.user.line for _, site in found.fresh} == {here(loss)} and len(found.fresh) == 2


def test_tensor_of_an_earlier_call_is_stale():
    kept = (A * 2).exp()

    def loss():
        return (kept * B).sum()  # here

    found = follow(loss)
    ((label, site),) = found.stale
    assert found.labels.names_of(label) == ("a",) and site.user.line == here(loss)


def test_view_of_a_parameter_made_earlier_is_not_stale():
    turned = A.view(2, 2)
    found = follow(lambda: (turned * 2).sum())
    assert found.stale == [] and reached(found) == (("a",), ("a",))


def test_parameters_in_one_storage_are_told_apart():
    flat = torch.ones(8)
    one, two = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    found = trace(lambda: (one.detach() * two).sum(), {"one": one, "two": two})
    assert cuts(found) == [("detach", ("one",))]


def test_library_frames_are_shown_beside_the_users(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages" / "somebodys_layers"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        textwrap.dedent("""
        def straight_through(h):
            return h.detach() * 2
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    import somebodys_layers

    def loss():
        return (somebodys_layers.straight_through(A) + B).sum()  # here

    (event,) = follow(loss).reaching
    assert event.site.user.line == here(loss) and event.site.user.file == __file__
    assert event.site.inside.line == 3 and "somebodys_layers" in str(event.site.inside)
    assert [caller.rpartition(".")[2] for caller in event.site.callers] == ["py:straight_through", "loss"]
    sys.modules.pop("somebodys_layers")


def test_sites_stop_at_the_loss_function():
    site = boundary(lambda: locate())
    assert len(site.callers) == 1 and site.user.file == __file__


def test_everything_is_put_back():
    apply, enter = torch.autograd.Function.__dict__["apply"], torch.inference_mode.__enter__
    with pytest.raises(ZeroDivisionError):
        follow(lambda: 1 / 0)
    assert torch.autograd.Function.__dict__["apply"] is apply and torch.inference_mode.__enter__ is enter
    F.relu(A)  # no mode is left behind
    assert torch._C._len_torch_function_stack() == 0 and torch._C._len_torch_dispatch_stack() == 0
