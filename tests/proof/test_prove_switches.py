"""`requires_grad` switched inside the loss function is a cut while it lasts, and no write to a value."""

from __future__ import annotations

import torch.nn.functional as F
from field_types import frozen_while_it_judges
from proof_cases import Pair, X, Y, marked

from qwen_fused.proof.prove import prove


def test_what_is_switched_on_before_it_is_used_is_no_cut() -> None:
    model = Pair()

    def loss():
        model.encoder.requires_grad_(False)
        model.encoder.requires_grad_(True)
        return F.cross_entropy(model(X), Y)

    report = prove(loss, model)
    assert report.ok and report.notes == [], report


def test_cut_of_a_switch_is_not_carried_past_by_the_given_backward() -> None:
    net, loss = frozen_while_it_judges()
    report = prove(loss, net, backward=lambda value: value.backward())
    assert report.ok and not any("carried past" in note for note in report.notes), report
    line = marked(frozen_while_it_judges, "requires_grad_(False)")
    assert any("Tensor.requires_grad_ at" in note and f":{line} in" in note for note in report.notes), report.notes
