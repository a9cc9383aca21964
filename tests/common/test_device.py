"""What --device takes, and the sentence for what it does not."""

from __future__ import annotations

import pytest
import torch

from qwen_fused.common.device import resolve_device


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "cuda:99", ""])
def test_refuses_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="device"):
        resolve_device(name)


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_cuda_where_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    assert resolve_device("auto").type == ("cuda" if there else "cpu")
