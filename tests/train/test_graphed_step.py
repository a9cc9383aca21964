"""The step as graphs: what a replay gives is what the eager step gives, and nothing that changes is left behind in it.

On the CPU `OpGraphs` stands for CUDA's graphs: it replays operations, and so goes wrong where a graph would.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import no_sync
from op_recorder import OpGraphs
from torch import Tensor

from qwen_fused.arc.episodes import collate
from qwen_fused.loss.checks import set_check_targets
from qwen_fused.train.graphed_step import (
    GraphedStep,
    StepTensors,
    bucket_canvas,
    integer_tensors,
)
from qwen_fused.train.trainer import Trainer


@pytest.fixture(autouse=True)
def one_hot_without_a_look(monkeypatch) -> None:
    """torch looks at the values on the CPU alone."""
    plain = F.one_hot

    def one_hot(x: Tensor, classes: int) -> Tensor:
        return plain(x, classes) if x.is_cuda else (x.unsqueeze(-1) == torch.arange(classes)).long()

    monkeypatch.setattr(F, "one_hot", one_hot)


@pytest.fixture
def make(small_config, tmp_path, device: torch.device):
    """Settings -> a trainer whose steps are recorded, by what stands for CUDA's graphs where there is no CUDA.

    Some of its prompts are too long, so that this figure differs from batch to batch.
    """

    def trainer(record: bool = True, **changes) -> Trainer:
        settings = {"prompt_window": 3, "max_prompt_tokens": 120, "warmup_batches": 4, "device": str(device)}
        made = Trainer(small_config(**{**settings, **changes}), tmp_path)
        if device.type == "cpu":
            made.graphs = GraphedStep(made, OpGraphs(device).record)
        if not record:
            # the same canvases and rates, step by step
            made.graphs.record = None
            made.graphs.failure, made.graphs.told = "off", True
        return made

    return trainer


def run(trainer: Trainer, batches: int) -> list[dict]:
    """Rows of batches, each read when the next one is under way, as in training."""
    rows, pending = [], []
    for _ in range(batches):
        epoch, index = divmod(trainer.progress.step, trainer.sampler.batches_per_epoch())
        episodes = trainer.sampler.batch(epoch, index)
        pending.append(trainer.train_step(episodes, epoch, flush=trainer.sampler.ends_window(index)))
        rows += [trainer.read(batch) for batch in pending[:-1]]
        del pending[:-1]
    return rows + [trainer.read(batch) for batch in pending]


def state(trainer: Trainer) -> list[Tensor]:
    moments = [x for entry in trainer.optimizer.state.values() for x in entry.values()]
    return [x.detach().clone() for x in [*trainer.model.state_dict().values(), *moments]]


def assert_same_run(ours: Trainer, theirs: Trainer, rows: list, others: list) -> None:
    """Bit for bit; on CUDA, where backward passes of torch add up in no fixed order, nearly, and weights not at all:
    where a gradient is next to nothing, AdamW steps by its sign."""
    if ours.device.type == "cpu":
        assert rows == others
        assert all(map(torch.equal, state(ours), state(theirs)))
    for one, two in zip(rows, others, strict=True):
        for key in ("step", "epoch", "loss", "efe", "size_loss", "truncated", "lr_agent"):
            assert one[key] == pytest.approx(two[key], rel=0.02), (key, one["step"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_replayed_run_is_the_eager_run(make, device, precision):
    eager, replayed = make(record=False, precision=precision), make(precision=precision)
    batches = eager.sampler.batches_per_epoch() + 5
    rows = []
    for trainer in (eager, replayed):
        torch.manual_seed(1)
        rows.append(run(trainer, batches))
    assert replayed.graphs.failure is None and replayed.graphs.steps and replayed.graphs.update is not None
    assert len({row["truncated"] for row in rows[0]}) > 1 and rows[0][-1]["epoch"] == 1
    assert_same_run(replayed, eager, rows[1], rows[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_replay_gives_the_eager_gradients(make, device, precision):
    """From the same weights and noise: the parameters' clipped gradients, the leaf's, and what is logged."""
    trainer, found = make(precision=precision), []
    episodes, before = trainer.sampler.batch(0, 0), {k: v.clone() for k, v in trainer.model.state_dict().items()}
    batch = collate(episodes, canvas=bucket_canvas([e.side for e in episodes])).to(device)
    for number in range(4):
        trainer.model.load_state_dict(before)
        torch.manual_seed(2)
        if number < 3:
            pending = trainer.train_step(episodes, 1, flush=False)
            leaf, logged = trainer.window.leaves[-1][0], pending.values
        else:
            trainer.optimizer.zero_grad()
            leaf = trainer.prompts(batch)
            done = trainer.backward_of(batch, leaf, 1, trainer.ranks.part(len(episodes)))
            logged = done.values
            trainer.scaler.unscale_(trainer.optimizer)
            trainer.norms.clip_(trainer.norms.measure(), trainer.config.clip)
        found.append([x.cpu() for x in (logged, leaf.grad, *(p.grad.clone() for p in trainer.graphs.parameters))])
        trainer.window.discard()
    assert trainer.graphs.steps and trainer.graphs.update is not None and trainer.graphs.failure is None
    rtol = (
        {"rtol": 1e-3 if precision == "fp32" else 2e-2, "atol": 1e-5}
        if device.type == "cuda"
        else {"rtol": 0, "atol": 0}
    )
    for values in found[:3]:
        for ours, theirs in zip(values, found[3], strict=True):
            torch.testing.assert_close(ours, theirs, **rtol)


def test_a_continued_run_is_the_unbroken_one(make, device):
    """In the middle of a window, and though the continuation has nothing recorded yet."""
    unbroken = make()
    torch.manual_seed(1)
    run(unbroken, 7)
    saved = {**unbroken.state_dict()}
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, saved)
    rows = run(unbroken, 6)
    continued = make()
    run(continued, 3)
    continued.load_state_dict(saved)
    again = run(continued, 6)
    assert_same_run(continued, unbroken, again, rows)


def test_waits_for_nothing(make, device):
    trainer = make(augment=0.0)
    episodes = trainer.sampler.batch(0, 0)

    def window() -> list:
        return [trainer.train_step(episodes, 1, flush=flush) for flush in (False, False, True)]

    pending = window()
    with no_sync(device):
        pending += window()
    assert trainer.graphs.failure is None and len(trainer.graphs.steps) == 1
    assert [trainer.read(batch)["step"] for batch in pending] == [1, 2, 3, 4, 5, 6]


def test_a_replay_is_a_write_to_autograd(make, device):
    trainer = make()
    episodes = trainer.sampler.batch(0, 0)
    for _ in range(4):
        before = [p._version for p in trainer.graphs.parameters]
        trainer.read(trainer.train_step(episodes, 1, flush=False))
        trainer.window.discard()
        assert all(p._version > version for p, version in zip(trainer.graphs.parameters, before, strict=True))
    assert trainer.graphs.update is not None


def test_an_update_is_recorded_once_the_optimizer_has_stepped(make, device):
    """Else its moments would be made, and be zeros, at every replay."""
    trainer = make()
    episodes = trainer.sampler.batch(0, 0)
    for number in range(4):
        trainer.read(trainer.train_step(episodes, 1, flush=False))
        trainer.window.discard()
        if number == 0:
            trainer.optimizer.state.clear()
        assert (trainer.graphs.update is None) == (number < 2)
    assert {float(entry["step"]) for p, entry in trainer.optimizer.state.items()} == {3.0}


def test_the_anchor_hears_of_a_batch(make, device, monkeypatch):
    """At every step, and of the batch at hand."""
    trainer, heard = make(), torch.zeros(1, device=device)
    monkeypatch.setattr(trainer.model.objective, "update_anchor", lambda target, solved: heard.add_(target.sum()))
    episodes = trainer.sampler.batch(0, 0)
    canvas = bucket_canvas([e.side for e in episodes])
    for number in range(1, 5):
        trainer.read(trainer.train_step(episodes, 1, flush=False))
        trainer.window.discard()
        assert heard.item() == number * collate(episodes, canvas=canvas).target.sum()


def test_nothing_is_drawn_while_recording(make, device):
    trainer = make()
    episodes = trainer.sampler.batch(0, 0)
    draws = []
    for _ in range(4):
        torch.manual_seed(3)
        trainer.read(trainer.train_step(episodes, 1, flush=False))
        trainer.window.discard()
        draws.append(torch.randn(4, device=device))
    assert trainer.graphs.steps and all(torch.equal(draw, draws[0]) for draw in draws)


def test_what_is_not_recorded_is_eager(make, monkeypatch):
    trainer = make(prompt_window=1)
    episodes = trainer.sampler.batch(0, 0)
    run_one = lambda some: trainer.read(trainer.train_step(some, 1))  # noqa: E731
    for _ in range(3):
        run_one(episodes[:-1])
    assert not trainer.graphs.steps, "a smaller batch"
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        for _ in range(3):
            run_one(episodes)
    assert not trainer.graphs.steps, "anomaly mode"
    set_check_targets(True)
    try:
        for _ in range(3):
            run_one(episodes)
    finally:
        set_check_targets(False)
    assert not trainer.graphs.steps, "targets are looked at"
    for _ in range(2):
        run_one(episodes)
    assert trainer.graphs.steps


@pytest.mark.parametrize("where", ["backward", "update"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_failure_is_told_once_and_the_run_goes_on(make, device, where, precision):
    eager, broken = make(record=False, precision=precision), make(precision=precision)
    record = broken.graphs.record

    def half() -> None:
        # the scaler then takes these gradients for unscaled
        broken.scaler.unscale_(broken.optimizer)
        1 / 0 if device.type == "cpu" else torch.ones(3, device=device).tolist()

    def fail(body):
        return record(half if (body == broken.step) == (where == "update") else body)

    def told(body):
        try:
            return fail(body)
        except ZeroDivisionError:
            raise RuntimeError("operation not permitted\nwhen stream is capturing") from None

    broken.graphs.record = told
    rows = []
    for trainer in (eager, broken):
        torch.manual_seed(1)
        rows.append([])
        hints = []
        for _ in range(8):
            rows[-1] += run(trainer, 1)
            hints += [str(hint) for hint in trainer.hints]
    (hint,) = hints
    assert "can't be recorded as a CUDA graph: " in hint and "\n" not in hint and "--cuda-graphs off" in hint
    assert not broken.graphs.steps and broken.graphs.update is None
    assert_same_run(broken, eager, rows[1], rows[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_replay_with_a_gradient_that_is_not_finite_leaves_the_weights(make, device, precision):
    trainer = make(precision=precision, on_nonfinite="skip")
    episodes, prompts = trainer.sampler.batch(0, 0), trainer.prompts

    def step(factor: float) -> dict:
        trainer.prompts = lambda batch: (prompts(batch).detach() * factor).requires_grad_()
        row = trainer.read(trainer.train_step(episodes, 1, flush=False))
        trainer.window.discard()
        return row

    for _ in range(3):
        assert step(1.0)["nonfinite"] == 0
    assert trainer.graphs.steps and trainer.graphs.update is not None
    before, scale = [p.detach().clone() for p in trainer.graphs.parameters], trainer.scaler.get_scale()
    assert step(float("nan"))["nonfinite"] == 1
    assert all(map(torch.equal, before, trainer.graphs.parameters))
    assert trainer.scaler.get_scale() == (scale / 2 if precision == "fp16" else scale)
    assert step(1.0)["nonfinite"] == 1
    assert not any(map(torch.equal, before, trainer.graphs.parameters))


def test_every_tensor_begins_where_triton_expects_it(make, device):
    """At 16 bytes, as a tensor of its own does: else a kernel would be compiled while recording."""
    trainer = make(batch_size=1)
    for side in (7, 8):
        episodes = trainer.sampler.batch(0, 0)
        batch = collate(episodes, canvas=(side, side))
        tensors = StepTensors.like(batch, torch.zeros(1, 48, device=device), 32)
        for static, own in zip(integer_tensors(tensors.batch), integer_tensors(batch), strict=True):
            assert static.data_ptr() % 16 == 0 and torch.equal(static.cpu(), own) and static.stride() == own.stride()


def test_a_larger_canvas_changes_roundings_alone(make, device):
    trainer = make()
    episodes = trainer.sampler.batch(0, 0)
    found = []
    for canvas in (None, (10, 12)):
        torch.manual_seed(0)
        trainer.model.zero_grad()
        trainer.window.discard()
        loss = trainer.forward(collate(episodes, canvas=canvas).to(device), epoch=1)[0].loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in trainer.graphs.parameters)])
    for tight, wide in zip(*found, strict=True):
        if tight.shape[:2] != (30, 30):
            torch.testing.assert_close(tight, wide, rtol=1e-3, atol=1e-6)
