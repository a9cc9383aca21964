"""Checkpoints come back bit for bit, whole or not at all, and nothing in them is executed."""

from __future__ import annotations

import pickle

import pytest
import torch

from qwen_fused.train import checkpoint
from qwen_fused.train.checkpoint import list_checkpoints, read_state, save_checkpoint, write_state


def test_round_trip_keeps_bits_types_and_keys(tmp_path):
    shared = torch.randn(3)
    state = {
        "float": torch.randn(2, 3),
        "half": torch.randn(4).bfloat16(),
        "bytes": torch.get_rng_state(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "nested": {0: {"a": shared, "b": shared}, 1: [1, 2.5, None, True, "x", shared[1:]]},
    }
    write_state(tmp_path / "s.safetensors", state)
    back = read_state(tmp_path / "s.safetensors")
    for name in ("float", "half", "bytes", "empty", "scalar"):
        assert back[name].dtype == state[name].dtype and torch.equal(back[name], state[name])
    assert list(back["nested"]) == [0, 1]
    assert torch.equal(back["nested"][0]["b"], shared) and torch.equal(back["nested"][1][5], shared[1:])
    assert back["nested"][1][:5] == [1, 2.5, None, True, "x"]


def test_optimizer_state_round_trip(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    write_state(tmp_path / "o.safetensors", optimizer.state_dict())
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=0.3)
    other.load_state_dict(read_state(tmp_path / "o.safetensors"))
    assert other.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 30, 1000000, 4):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    assert [read_state(p)["step"] for p in list_checkpoints(tmp_path)] == [4, 30, 1000000]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "step-000001.safetensors"
    write_state(path, {"a": 1})

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        write_state(path, {"a": 2})
    assert read_state(path) == {"a": 1}


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "foreign"])
def test_damaged_file_gets_one_sentence(tmp_path, damage):
    path = tmp_path / "step-000001.safetensors"
    write_state(path, {"a": torch.zeros(100)})
    whole = path.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes({"truncated": whole[:-50], "garbage": b"\x00" * 64, "empty": b""}[damage])
    with pytest.raises(ValueError, match="step-000001"):
        read_state(path)


def test_pickles_are_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "step-000001.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError):
        read_state(path)
    assert not (tmp_path / "exploded").exists()


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="existing file"):
        read_state(tmp_path / "none.safetensors")
