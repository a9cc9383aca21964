"""Half-precision weights train as float32 ones do, rounded once; skipping, saving and the proof go by the masters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from proof_cases import ENCODER, Pair, X, Y, only_finding
from torch import Tensor, nn

from qwen_fused.proof.prove import prove
from qwen_fused.train import optimizer as optimizer_module
from qwen_fused.train.checkpoint import read_state, write_state
from qwen_fused.train.optimizer import MasterAdamW, chunks
from qwen_fused.train.prove_trainer import prove_trainer
from qwen_fused.train.trainer import Trainer
from qwen_fused.window.prompt_window import PromptWindow

SHAPES = [(7, 5), (5,), (), (0, 3), (3, 4)]


def weights(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    # each dtype sees the same values, those that bfloat16 can hold
    return [nn.Parameter(v.bfloat16().to(dtypes[i % len(dtypes)])) for i, v in enumerate(values)]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]


def run(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


OPTIONS = dict(lr=3e-4, betas=(0.9, 0.98), weight_decay=0.01)


@pytest.mark.parametrize("chunk", [2**26, 1], ids=["at once", "one by one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_float32_training_rounded_once(dtype, chunk, monkeypatch):
    monkeypatch.setattr(optimizer_module, "CHUNK", chunk)
    whole, half = weights(torch.float32), weights(dtype)
    run(whole, torch.optim.AdamW(whole, fused=True, **OPTIONS), range(40))
    optimizer = MasterAdamW(half, **OPTIONS)
    run(half, optimizer, range(40))
    for p, q in zip(whole, half, strict=True):
        assert q.dtype == dtype and torch.equal(q, p.to(dtype))
        assert torch.equal(optimizer.state[q]["master"], p)


def test_float32_weights_step_as_under_adamw():
    plain, ours = weights(torch.float32), weights(torch.float32, torch.bfloat16)
    run(plain, torch.optim.AdamW(plain, fused=True, **OPTIONS), range(5))
    optimizer = MasterAdamW(ours, **OPTIONS)
    run(ours, optimizer, range(5))
    for index, (p, q) in enumerate(zip(plain, ours, strict=True)):
        assert torch.equal(p.to(q.dtype), q)
        assert ("master" in optimizer.state[q]) == (index % 2 == 1)


@pytest.mark.parametrize("kind", [MasterAdamW, torch.optim.AdamW])
def test_small_steps_add_up(kind):
    """A norm weight of 1 under Qwen's learning rate: the reason for masters, and what happens without."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = kind([weight], lr=3e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 0.97 if kind is MasterAdamW else 1.0))


def test_skips_where_found_inf_is_set():
    parameters = weights(torch.bfloat16, torch.float32)
    optimizer = MasterAdamW(parameters, **OPTIONS)
    run(parameters, optimizer, range(2))
    values = [p.detach().clone() for p in parameters]
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in parameters]
    optimizer.found_inf = torch.ones(())
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    for p, value, state in zip(parameters, values, states, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][name], old) for name, old in state.items())
    optimizer.found_inf = torch.zeros(())
    run(parameters, optimizer, range(2, 3))
    assert {float(optimizer.state[p]["step"]) for p in parameters} == {3.0}


def test_divides_by_grad_scale():
    plain, scaled = weights(torch.bfloat16), weights(torch.bfloat16)
    run(plain, MasterAdamW(plain, **OPTIONS), range(3))
    optimizer = MasterAdamW(scaled, **OPTIONS)
    optimizer.grad_scale = torch.tensor(8.0)
    for step in range(3):
        for parameter, gradient in zip(scaled, gradients(step), strict=True):
            parameter.grad = 8 * gradient
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, scaled, strict=True))


def test_leaves_alone_what_has_no_gradient():
    parameters = weights(torch.bfloat16)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer = MasterAdamW(parameters, lr=0.1)
    versions = [p._version for p in parameters]
    optimizer.step()
    assert [p._version > v for p, v in zip(parameters, versions, strict=True)] == [True] + [False] * 4
    assert list(optimizer.state) == parameters[:1]


def test_returns_the_closures_loss():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=0.5, weight_decay=0.0)

    def closure() -> Tensor:
        loss = weight.float().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3 and weight.tolist() == [0.5] * 3


def test_state_comes_back_bit_for_bit(tmp_path):
    straight, broken = weights(torch.bfloat16, torch.float32), weights(torch.bfloat16, torch.float32)
    run(straight, MasterAdamW(straight, **OPTIONS), range(6))
    first = MasterAdamW(broken, **OPTIONS)
    run(broken, first, range(3))
    write_state(tmp_path / "o.safetensors", first.state_dict())
    second = MasterAdamW(broken, lr=1.0)
    state = read_state(tmp_path / "o.safetensors")
    second.load_state_dict(state)
    run(broken, second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(straight, broken, strict=True))
    # what was loaded has not moved with the steps that followed
    assert state["state"][0]["master"].dtype == torch.float32
    assert not torch.equal(state["state"][0]["master"], second.state[broken[0]]["master"])


def test_refuses_a_state_without_masters():
    parameters = weights(torch.bfloat16)
    other = torch.optim.AdamW(parameters, fused=True)
    run(parameters, other, range(1))
    with pytest.raises(ValueError, match="must hold a float32 master for each half-precision parameter"):
        MasterAdamW(parameters).load_state_dict(other.state_dict())


def test_widens_no_more_than_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(optimizer_module, "CHUNK", 10)
    half = [torch.zeros(n, dtype=torch.bfloat16) for n in (4, 6, 1, 20, 3)]
    whole = torch.zeros(1000)
    sizes = [[t.numel() for t in members] for members in chunks([*half[:2], whole, *half[2:]])]
    assert sizes == [[4, 6, 1000], [1], [20], [3]]
    assert list(chunks([])) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_inside_a_window_is_refused(dtype):
    weight = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    optimizer = MasterAdamW([weight], lr=1e-6)
    window = PromptWindow(lambda keys: weight[keys].float(), 2)
    window.prompts([0]).sum().backward()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed inside the window"):
        window.prompts([1])


def half_proof(optimizer_of, lr: float = 1e-7):
    model = Pair().bfloat16()
    return prove(
        lambda: F.cross_entropy(model(X.bfloat16()).float(), Y), model, optimizer_of(model.parameters(), lr=lr)
    )


def test_proof_counts_a_step_that_a_master_keeps():
    report = half_proof(MasterAdamW)
    assert report.ok and "4 of them so far in the optimizer's float32 masters only" in str(report)
    assert "masters" not in str(half_proof(MasterAdamW, lr=0.1))


class Keepsake(torch.optim.SGD):
    """Keeps wide copies, or something of their shape, and never steps them."""

    def __init__(self, params, lr, offset=0.0):
        super().__init__(params, lr=lr)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["copy"] = p.detach().float() + offset


class Drifting(Keepsake):
    """Moves a wide tensor that is not the parameter's master."""

    def __init__(self, params, lr):
        super().__init__(params, lr, offset=1.0)

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["copy"] += 1e-7


@pytest.mark.parametrize("kind", [Keepsake, Drifting, torch.optim.SGD])
def test_proof_is_not_fooled_by_other_state(kind):
    found = only_finding(half_proof(kind), "applied", "rounded away")
    assert found.parameters == (*ENCODER, "head.weight", "head.bias")


def steps(trainer: Trainer, count: int) -> dict:
    for index in range(trainer.progress.step, trainer.progress.step + count):
        trainer.read(trainer.train_step(trainer.sampler.batch(0, index), 0))
    return trainer.state_dict()


def test_bfloat16_qwen_resumes_bitwise(small_config, tmp_path):
    config = small_config(qwen_dtype="bfloat16")
    straight = steps(Trainer(config, tmp_path), 4)
    write_state(tmp_path / "s.safetensors", steps(Trainer(config, tmp_path), 2))
    resumed = Trainer(config, tmp_path)
    resumed.load_state_dict(read_state(tmp_path / "s.safetensors"))
    again = steps(resumed, 2)
    torch.testing.assert_close(again["model"], straight["model"], rtol=0, atol=0)
    torch.testing.assert_close(again["optimizer"]["state"], straight["optimizer"]["state"], rtol=0, atol=0)
    kept = [state["master"].dtype for state in again["optimizer"]["state"].values() if "master" in state]
    qwen = [value.dtype for name, value in again["model"].items() if "backbone" in name]
    assert kept == [torch.float32] * len(qwen) and set(qwen) == {torch.bfloat16}


def test_bfloat16_qwen_is_proved(small_config, tmp_path):
    report = prove_trainer(Trainer(small_config(qwen_dtype="bfloat16"), tmp_path))
    assert report.ok and "float32 masters only" in str(report)


def test_bfloat16_adapters_need_no_masters(small_config, tmp_path):
    trainer = Trainer(small_config(qwen_dtype="bfloat16", lora_rank=2), tmp_path)
    trainer.read(trainer.train_step(trainer.sampler.batch(0, 0), 0))
    assert not any("master" in state for state in trainer.optimizer.state.values())
