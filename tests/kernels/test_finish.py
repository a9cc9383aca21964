"""The finishing pass over more tiles, steps and episodes than a block of it holds, and tiles where no cell counts."""

from __future__ import annotations

import pytest
import torch
from efe_cases import ALL_TERMS, check, make_case

from qwen_fused import backends

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not backends.HAS_TRITON, reason=f"no Triton: {backends.TRITON_ERROR}"),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two tiles, steps and episodes, so that small cases go round each loop."""
    from qwen_fused.kernels import efe_loss

    real = efe_loss._finish_blocks
    monkeypatch.setattr(efe_loss, "_finish_blocks", lambda *args: (False, 2, 2, real(*args)[3], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_go_on_from_block_to_block(fused, small_blocks, dtype):
    """Five tiles of 32 cells, three steps, three episodes: the last block of each is not full."""
    case = make_case(B=3, T=3, C=5, H=16, W=10, dtype=dtype)
    case["target"][1] = -100
    check(case, fused, weights=ALL_TERMS)


@pytest.mark.parametrize("steps", [1, 5])
def test_dead_tiles_leave_zeros(fused, steps):
    """No cell writes their slots: what memory held before must not come through."""
    case = make_case(B=2, T=steps, C=10, H=8, W=12, dtype=torch.float32)
    case["target"][:, 2:6] = -100
    case["target"][1, 3:] = -100
    check(case, fused, weights=ALL_TERMS)
