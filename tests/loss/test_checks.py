"""What the EFE loss refuses, in a sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from efe_cases import make_case

from qwen_fused.loss.cross_entropy import hard_cell_cross_entropy
from qwen_fused.loss.efe_loss import EFEWeights, efe_loss

BAD_INPUT = [
    ({"plan_logits": torch.zeros(2, 3, 4)}, "plan_logits must be .B, T, C, H, W., got .2, 3, 4."),
    ({"plan_logits": torch.zeros(2, 3, 5, 4, 3, dtype=torch.int64)}, "plan_logits must be float16.*int64"),
    ({"plan_logits": torch.zeros(2, 0, 5, 4, 3)}, "at least one step T, got .2, 0, 5, 4, 3."),
    ({"plan_logits": torch.zeros(2, 3, 65, 4, 3)}, "1 to 64 classes, got C = 65"),
    ({"target": torch.zeros(2, 4, 4, dtype=torch.long)}, "target must be .B, H, W. = .2, 4, 3., got .2, 4, 4."),
    ({"target": torch.zeros(2, 4, 3)}, "target must have an integer dtype, got torch.float32"),
    ({"target": torch.zeros(2, 4, 3, dtype=torch.bool)}, "target must have an integer dtype, got torch.bool"),
    ({"target": torch.full((2, 4, 3), 9)}, "target must be in .0, 5. or ignore_index -100, got 9"),
    ({"back_logits": torch.zeros(2, 2, 5, 4, 3)}, "back_logits must be .*, got .2, 2, 5, 4, 3."),
    ({"preference_logits": torch.zeros(5, 4, 3)}, "preference_logits must be .B, C, H, W. = .2, 5, 4, 3."),
    ({"anchor_log_probs": torch.zeros(2, 5, 4, 3)}, "anchor_log_probs must be .C, H, W. = .5, 4, 3."),
    ({"obs_entropy": torch.zeros(4)}, "obs_entropy must be .C. = .5,., got .4,."),
    ({"prompt_colors": torch.zeros(5)}, "prompt_colors must be .B, C. = .2, 5., got .5,."),
    ({"step_weight": torch.zeros(4)}, "step_weight must be .T. = .3,., got .4,."),
    ({"class_weight": torch.zeros(5, dtype=torch.int32)}, "class_weight must be float16.*got torch.int32"),
    ({"anchor_log_probs": torch.zeros(5, 4, 3, requires_grad=True)}, "anchor_log_probs must not require grad"),
    ({"step_weight": torch.ones(3, requires_grad=True)}, "step_weight must not require grad"),
    ({"back_logits": torch.zeros(2, 3, 5, 4, 3, device="meta")}, "back_logits must be on cpu .*got meta"),
    ({"plan_logits": torch.nested.nested_tensor([torch.zeros(3, 5, 4, 3)] * 2)}, "plan_logits must be a dense.*nested"),
    (
        {"target": torch.zeros(2, 4, 3, dtype=torch.long).to_sparse()},
        "target must be a dense tensor, got torch.sparse_coo",
    ),
    ({"prompt_colors": torch.zeros(2, 5).to_sparse()}, "prompt_colors must be a dense tensor, got torch.sparse_coo"),
    ({"hard_mode": "grid"}, "hard_mode must be one of .*got 'grid'"),
    ({"hard_floor": torch.tensor(0.5, requires_grad=True)}, "hard_floor must be a number in .0, 1., got tensor"),
    ({"hard_floor": "0.5"}, "hard_floor must be a number in .0, 1., got '0.5'"),
    ({"hard_floor": 1.5}, "hard_floor must be in .0, 1., got 1.5"),
    ({"weights": {"ce": 1.0}}, "weights must be an EFEWeights, got dict"),
    ({"ignore_index": 2**70}, "ignore_index must be an int of 64 bits, got 1180591620717411303424"),
    ({"target": [[0]]}, "target must be a tensor, got list"),
    ({"plan_logits": None}, "plan_logits must be a tensor, got NoneType"),
    ({"prompt_colors": 3.0}, "prompt_colors must be a tensor, got float"),
    ({"ignore_index": 1.0}, "ignore_index must be an int, got 1.0"),
    ({"backend": "fast"}, "backend must be one of .*got 'fast'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_INPUT)
def test_rejects_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        efe_loss(**{"backend": "reference", **make_case(), **change})


@pytest.mark.parametrize("value", [-1.0, -1e-9, float("nan"), float("inf"), 10**400, "1", None])
@pytest.mark.parametrize("name", ["ce", "prompt"])
def test_rejects_a_weight_that_is_no_cost(name, value):
    with pytest.raises(ValueError, match=rf"weights\.{name} must be a finite number of at least 0, got {value!r}"):
        EFEWeights(**{name: value})


BAD_FLAT_INPUT = [
    ({"logits": torch.zeros(3)}, r"logits must be \[N, C\] or \[B, C, H, W\], got \(3,\)"),
    ({"logits": torch.zeros(3, 65)}, "logits must have 1 to 64 classes, got C = 65"),
    ({"logits": torch.zeros(3, 2).long()}, "logits must be float16.*got torch.int64"),
    ({"logits": [[0.0, 1.0]]}, "logits must be a tensor, got list"),
    ({"target": torch.zeros(2).long()}, r"target must be \[N\] for logits of shape \(3, 2\), got \(2,\)"),
    ({"target": [0, 1, 1]}, "target must be a tensor, got list"),
    ({"target": torch.zeros(3)}, "target must have an integer dtype, got torch.float32"),
    ({"target": torch.zeros(3, device="meta").long()}, "target must be on cpu like logits, got meta"),
    (
        {"target": torch.tensor([0, 2, 1])},
        r"target must be in \[0, 2\) or ignore_index -100, got 2 \(1 cells outside\)",
    ),
    ({"class_weight": torch.ones(3)}, r"class_weight must be \[C\] = \(2,\), got \(3,\)"),
    ({"ignore_index": -(2**63) - 1}, "ignore_index must be an int of 64 bits"),
    ({"ignore_index": "a"}, "ignore_index must be an int, got 'a'"),
    ({"reduction": "sum"}, "reduction must be one of mean, episode, none, got 'sum'"),
]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("change", "message"), BAD_FLAT_INPUT)
def test_rejects_bad_flat_input(change, message, backend):
    given = {"logits": torch.zeros(3, 2), "target": torch.zeros(3).long(), "backend": backend}
    with pytest.raises(ValueError, match=message):
        hard_cell_cross_entropy(**{**given, **change})


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_an_ignore_index_that_the_targets_dtype_can_not_hold_ignores_nothing(backend):
    """Torch itself would wrap it: in uint8, 300 is 44, and -100 is 156."""
    logits, target = torch.randn(3, 50), torch.tensor([44, 1, 2], dtype=torch.uint8)
    for ignore_index in (300, -100, 2**40):
        out = hard_cell_cross_entropy(logits, target, ignore_index=ignore_index, hard_mode="none", backend=backend)
        torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, target.long()))
    with pytest.raises(ValueError, match="got 156"):
        hard_cell_cross_entropy(logits, target.clamp_min(156), backend=backend)
