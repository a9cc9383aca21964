"""Two processes train as one does: the same curve, norms and weights, whole or sharded; each goes on as the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from two_processes import run_ranks, said

from qwen_fused.config import TrainConfig
from qwen_fused.parallel.processes import BUCKET_BYTES, Ranks, buckets, process_group
from qwen_fused.train.checkpoint import read_state, write_state
from qwen_fused.train.pending import SCALARS
from qwen_fused.train.trainer import Trainer
from qwen_fused.train.window_state import new_keys

RANKS, BATCHES, HALF = 2, 8, 4
# batches that two processes cannot share evenly, windows whose middle is where the checkpoint is
SETTINGS = dict(batch_size=5, prompt_window=3, prompt_visits=2, warmup_batches=2, max_batches=BATCHES)
GRADS = ("qwen_grad", "agent_grad", "policy_grad")


def go(trainer: Trainer, until: int) -> list[dict]:
    """Train up to a batch, as the run's loop does."""
    rows = []
    while trainer.progress.step < until:
        epoch, index = divmod(trainer.progress.step, trainer.sampler.batches_per_epoch())
        episodes = trainer.sampler.batch(epoch, index)
        rows.append(trainer.read(trainer.train_step(episodes, epoch, flush=trainer.sampler.ends_window(index))))
    return rows


def kept(trainer: Trainer) -> dict:
    """What a run's end is compared by."""
    state = trainer.state_dict()
    return {"model": state["model"], "generator": state["rng"]["cpu"]}


def in_halves(config: TrainConfig, folder: Path, name: str, ranks: Ranks | None = None) -> dict:
    """A run with a checkpoint in its middle."""
    trainer = Trainer(config, folder, ranks)
    rows = go(trainer, HALF)
    state = trainer.state_dict()
    if trainer.ranks.is_main:
        write_state(folder / f"{name}.safetensors", state)
    rows += go(trainer, BATCHES)
    return {"rows": rows, "state": kept(trainer)}


def second_half(config: TrainConfig, folder: Path, name: str, ranks: Ranks | None = None) -> dict:
    """The same run from another one's checkpoint on."""
    trainer = Trainer(config, folder, ranks)
    trainer.load_state_dict(read_state(folder / f"{name}.safetensors"))
    return {"rows": go(trainer, BATCHES), "state": kept(trainer)}


def work(rank: int, path: Path, config: TrainConfig, sharded: TrainConfig) -> int:
    results = {}
    with process_group() as ranks:
        results["two"] = in_halves(config, path, "two", ranks)
        results["one, then two"] = second_half(config, path, "one", ranks)
        results["sharded"] = in_halves(sharded, path, "sharded", ranks)
        results["two, then sharded"] = second_half(sharded, path, "two", ranks)
        results["small batch"] = small_batch(config, path, ranks)
        results["largest"] = ranks.all_reduce_max(rank, 3 - rank, False)
    torch.save(results, path / f"{rank}.pt")
    return 0


def small_batch(config: TrainConfig, folder: Path, ranks: Ranks | None = None) -> dict:
    """A batch of one episode: one of two processes has nothing of its own."""
    trainer = Trainer(config, folder, ranks)
    return {"rows": [trainer.read(trainer.train_step(trainer.sampler.batch(0, 0)[:1], 1))]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config_in) -> dict[str, dict]:
    """What one process found, and the first of two, under the names of the runs."""
    folder = tmp_path_factory.mktemp("distributed")
    config = config_in(folder, **SETTINGS)
    sharded = replace(config, shard_qwen=True)
    found = {"one": in_halves(config, folder, "one"), "one, small batch": small_batch(config, folder)}
    codes = run_ranks(lambda rank: work(rank, folder, config, sharded), folder, RANKS)
    assert codes == [0] * RANKS, "".join(said(folder, rank) for rank in range(RANKS))
    results = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    found["two, then one"] = second_half(config, folder, "two")
    # one process has nothing to shard, and says nothing
    found["sharded, then one"] = second_half(sharded, folder, "sharded")
    return found | results[0] | {"second": results[1]}


RUNS = ["two", "one, then two", "sharded", "two, then sharded", "two, then one", "sharded, then one"]


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_that_of_one_process(runs, name: str) -> None:
    expected = runs["one"]["rows"][-len(runs[name]["rows"]) :]
    assert [row["step"] for row in runs[name]["rows"]] == [row["step"] for row in expected]
    for ours, theirs in zip(runs[name]["rows"], expected, strict=True):
        for key in (*SCALARS, *GRADS):
            # Qwen has no gradient before its first flush
            expected_value = theirs[key] if theirs[key] is None else pytest.approx(theirs[key], rel=1e-5, abs=1e-6)
            assert ours[key] == expected_value, (ours["step"], key)


@pytest.mark.parametrize("name", RUNS)
def test_weights_anchor_and_generator_are_those_of_one_process(runs, name: str) -> None:
    ours, theirs = runs[name]["state"], runs["one"]["state"]
    assert torch.equal(ours["generator"], theirs["generator"])
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_both_processes_have_the_same_bits(runs) -> None:
    for name in ("two", "sharded"):
        ours, theirs = runs[name]["state"]["model"], runs["second"][name]["state"]["model"]
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert runs[name]["rows"] == runs["second"][name]["rows"]


def test_a_batch_smaller_than_the_world(runs) -> None:
    ours, theirs = runs["small batch"]["rows"][0], runs["one, small batch"]["rows"][0]
    for key in (*SCALARS, *GRADS):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key


def test_largest_number_of_all_processes(runs) -> None:
    for found in (runs, runs["second"]):
        assert found["largest"] == [1, 3, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_parts_cover_a_batch_once(count: int) -> None:
    for size in (1, 2, 3, 5):
        parts = [Ranks(rank, size).part(count) for rank in range(size)]
        covered = [row for part in parts if part.weight for row in range(count)[part.rows]]
        assert covered == list(range(count))
        assert sum(part.weight for part in parts) == pytest.approx(1.0)
        assert all(len(range(count)[part.rows]) for part in parts)


def test_buckets_hold_everything_once_and_little_enough() -> None:
    few = BUCKET_BYTES // 4 // 2
    grads = [
        torch.empty(few + 1),
        torch.empty(3),
        torch.empty(few, dtype=torch.bfloat16),
        torch.empty(few),
        torch.empty(1),
    ]
    found = list(buckets(grads))
    assert sorted(id(grad) for bucket in found for grad in bucket) == sorted(map(id, grads))
    assert [len(bucket) for bucket in found] == [2, 2, 1]
    assert list(buckets([])) == []


def test_new_keys_of_a_window() -> None:
    assert new_keys(["abca", "ab", "cd"]) == [["a", "b", "c"], ["d"]]


@pytest.mark.parametrize(("setting", "value"), [("precision", "fp16"), ("lora_rank", 4)])
def test_refuses_what_cannot_be_sharded(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be .* with shard_qwen, got"):
        TrainConfig(shard_qwen=True, **{setting: value})
