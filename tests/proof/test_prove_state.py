"""What a loss function switches, replaces and leaves behind is as it was after the proof, each kind alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from proof_cases import Pair, X, Y

from qwen_fused.proof.prove import prove


class Kept(Pair):
    """A model with a buffer and plain attributes, and something that a call does to them."""

    def __init__(self, does):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.last, self.pair, self.does = torch.zeros(8), (torch.zeros(8), torch.zeros(2)), does

    def forward(self, x):
        hidden = self.encoder(x)
        self.does(self, hidden.detach().mean(0))
        return self.head(hidden)


def switches_a_buffer(model, mean):
    model.average.requires_grad_(True)


def switches_a_parameter(model, mean):
    model.head.bias.requires_grad_(False)


def gives_a_buffer_another_storage(model, mean):
    model.average.data = (model.average + mean).double()


def replaces_a_buffer(model, mean):
    model.average = model.average + mean


def writes_to_an_attribute(model, mean):
    model.last.add_(mean)


def replaces_an_attribute(model, mean):
    model.last = model.last + mean.double()


def writes_into_a_tuple(model, mean):
    model.pair[0].add_(mean)


def leaves_a_new_attribute(model, mean):
    model.seen = mean


@pytest.mark.parametrize("raises", [False, True], ids=["", "raising"])
@pytest.mark.parametrize(
    "does",
    [
        switches_a_buffer,
        switches_a_parameter,
        gives_a_buffer_another_storage,
        replaces_a_buffer,
        writes_to_an_attribute,
        replaces_an_attribute,
        writes_into_a_tuple,
        leaves_a_new_attribute,
    ],
    ids=lambda does: does.__name__,
)
def test_is_as_it_was(does, raises) -> None:
    model, calls = Kept(does), []
    held = model.average, model.average.data_ptr(), model.last, model.pair

    def loss():
        calls.append(len(calls))
        value = F.cross_entropy(model(X), Y)
        if raises and len(calls) == 4:
            raise KeyError("batch")
        return value

    if raises:
        with pytest.raises(KeyError, match="batch"):
            prove(loss, model, torch.optim.SGD(model.parameters(), 0.1))
    else:
        prove(loss, model, torch.optim.SGD(model.parameters(), 0.1))
    assert (model.average, model.average.data_ptr(), model.last, model.pair) == held
    assert all(t.dtype == torch.float32 and not t.any() for t in (model.average, model.last, *model.pair))
    assert not model.average.requires_grad and model.head.bias.requires_grad and not hasattr(model, "seen")
    assert torch.get_default_dtype() == torch.float32


def test_every_call_begins_with_the_same_state() -> None:
    begins: list[tuple[float, ...]] = []

    def counts(model, mean):
        begins.append((float(model.average.sum()), float(model.last.sum()), float(model.pair[0].sum())))
        model.average.data = model.average.data + 1
        model.last = model.last + 1
        model.pair[0].add_(1)

    model = Kept(counts)
    prove(lambda: F.cross_entropy(model(X), Y), model, torch.optim.SGD(model.parameters(), 0.1))
    # buffers as at the start; what modules keep in attributes as it was before or after the first call, or the second
    assert {average for average, _, _ in begins} == {0.0}
    assert {last for _, last, _ in begins} <= {0.0, 8.0} and len(begins) > 6
