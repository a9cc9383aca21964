"""trl's trainers with each of their losses, proved before the first step by the callback. Slow; run with -m slow."""

from __future__ import annotations

import pytest

import qwen_fused as qf

trl = pytest.importorskip("trl", reason="trl is an extra of development")

from test_trl_callback import dpo, grpo, sft  # noqa: E402

LOOPS = [
    *((sft, {"loss_type": loss}) for loss in ("nll", "dft")),
    *((sft, change) for change in ({"packing": True}, {"gradient_checkpointing": True}, {"bf16": True})),
    *(
        (dpo, {"loss_type": loss})
        for loss in (
            "sigmoid", "hinge", "ipo", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "discopop", "apo_zero", "apo_down", "nca_pair",
        )
    ),
    *((grpo, {"loss_type": loss}) for loss in ("grpo", "bnpo", "dr_grpo", "dapo")),
    (dpo, {"loss_type": "exo_pair", "label_smoothing": 1e-3}),
    (grpo, {"importance_sampling_level": "sequence"}),
]  # fmt: skip


def name_of(loop) -> str:
    make, changes = loop
    return make.__name__ + "".join(f":{value if key == 'loss_type' else key}" for key, value in changes.items())


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS, ids=name_of)
def test_loop_is_proved(loop, tmp_path):
    make, changes = loop
    callback = qf.ProveCallback(only_warn=True)
    make(tmp_path, callbacks=[callback], max_steps=1, **changes).train()
    assert callback.report.verdict == "proved", callback.report
