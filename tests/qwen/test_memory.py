"""The memory estimate against what torch really keeps, and the advice against the estimate."""

from pathlib import Path

import pytest
import torch
from qwens import save_qwen

from qwen_fused.cli.main import main
from qwen_fused.config import TrainConfig
from qwen_fused.qwen.backbone import load_backbone
from qwen_fused.qwen.memory import advise, available_memory, check_memory, estimate_memory, format_bytes
from qwen_fused.qwen.tiny import SHAPE
from qwen_fused.train.optimizer import MasterAdamW

BATCH, TOKENS = 4, 96
CASES = {
    "tiny": ("tiny", {}),
    "qwen2.5": ("qwen2.5", {}),
    "qwen3": ("qwen3", {}),
    "bfloat16": ("qwen2.5", dict(dtype=torch.bfloat16)),
    "qwen3, bfloat16": ("qwen3", dict(dtype=torch.bfloat16)),
    "lora": ("qwen2.5", dict(lora_rank=4)),
    "lora, bfloat16": ("qwen2.5", dict(lora_rank=4, dtype=torch.bfloat16)),
    "qwen3, lora": ("qwen3", dict(lora_rank=4)),
    "qwen3, lora, bfloat16": ("qwen3", dict(lora_rank=4, dtype=torch.bfloat16)),
    "eager": ("qwen2.5", dict(attention="eager")),
    "qwen3, eager, bfloat16": ("qwen3", dict(attention="eager", dtype=torch.bfloat16)),
    "checkpointing": ("tiny", dict(gradient_checkpointing=True)),
}


def kept_for_backward(backbone) -> tuple[int, torch.Tensor]:
    """Bytes of every storage that autograd saves in a forward pass but the weights' own, and its result."""
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # the reference keeps the address from being used twice
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return sum(storage.nbytes() for storage in kept.values()), hidden


@pytest.mark.parametrize("case", CASES)
def test_estimate_is_what_torch_keeps(case, tmp_path):
    kind, arguments = CASES[case]
    if kind != "tiny":
        save_qwen(tmp_path, kind)
    qwen = "tiny" if kind == "tiny" else str(tmp_path)
    estimate = estimate_memory(qwen, batch_size=BATCH, max_prompt_tokens=TOKENS, **arguments)
    backbone, _ = load_backbone(qwen, **arguments)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    # the tiny vocabulary of rules and markers is a few rows more than the bytes
    assert estimate.weights == pytest.approx(sum(p.nbytes for p in backbone.parameters()), rel=0.01)
    assert estimate.gradients == pytest.approx(sum(p.nbytes for p in trained), rel=0.01)
    kept, hidden = kept_for_backward(backbone)
    hidden.float().sum().backward()
    optimizer = MasterAdamW(trained)
    optimizer.step()
    state = sum(value.nbytes for s in optimizer.state.values() for value in s.values() if value.dim())
    assert estimate.optimizer == pytest.approx(state, rel=0.01)
    if "gradient_checkpointing" in arguments:
        # on top of what is kept, one layer is laid out again while its gradient is computed
        whole = estimate_memory(qwen, batch_size=BATCH, max_prompt_tokens=TOKENS).activations
        kept += whole / SHAPE["num_hidden_layers"]
    assert estimate.activations == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_layers_are_not_underrated(kind, dtype, tmp_path):
    """Routed experts and linear attention keep more than the layers that were counted: at most what is said."""
    save_qwen(tmp_path, kind)
    estimate = estimate_memory(str(tmp_path), batch_size=BATCH, max_prompt_tokens=TOKENS, dtype=dtype)
    kept, _ = kept_for_backward(load_backbone(str(tmp_path), dtype=dtype)[0])
    assert 0.6 * estimate.activations < kept < 1.05 * estimate.activations


def test_retained_graphs_count_by_batch():
    one, ten = (estimate_memory(retained_batches=n) for n in (1, 10))
    assert ten.activations == 10 * one.activations and ten.weights == one.weights


def test_says_itself():
    text = str(estimate_memory(batch_size=1, max_prompt_tokens=64))
    assert text.startswith("Qwen needs about ") and text.endswith(".") and "activations" in text
    assert [format_bytes(n * 1024**2) for n in (1, 99, 512, 2048, 20480)] == [
        "1.0 MiB",
        "99 MiB",
        "0.50 GiB",
        "2.0 GiB",
        "20 GiB",
    ]


@pytest.mark.parametrize(
    ("saving", "flags"),
    [
        ({}, None),
        (dict(gradient_checkpointing=True), "pass --gradient-checkpointing."),
        (dict(gradient_checkpointing=True, batch_size=4), "pass --gradient-checkpointing --batch-size 4."),
    ],
)
def test_advice_names_flags_that_help(saving, flags):
    # just the memory that the run needs with these savings
    said = advise(estimate_memory(**saving).total)
    if flags is None:
        assert said is None
    else:
        assert flags in said and "is free" in said and "\n" not in said
    assert "take a smaller --qwen." in advise(2**20)


def test_advice_names_a_smaller_batch_when_checkpointing_is_on():
    flags = dict(gradient_checkpointing=True, max_prompt_tokens=256)
    assert "pass --batch-size 4." in advise(estimate_memory(batch_size=4, **flags).total, **flags)
    everything = dict(gradient_checkpointing=True, lora_rank=2, dtype=torch.bfloat16, batch_size=1)
    assert "with every saving on: take a smaller --qwen." in advise(1, **everything)


def test_advice_names_the_windows_graphs_where_they_are_the_problem():
    fits = estimate_memory(retained_batches=1).total
    assert "pass --window-mode recompute." in advise(fits, retained_batches=3)
    # it is on already, or the window has one batch's graphs anyway
    assert "--window-mode" not in advise(fits - 1, retained_batches=1)


def test_advice_names_lora_when_the_optimizer_is_the_problem():
    arguments = dict(batch_size=1, max_prompt_tokens=64)
    need = estimate_memory(**arguments)
    assert "pass --lora-rank 16" in advise(need.weights * 2 + need.activations, **arguments)


def test_available_memory_of_this_machine():
    available = available_memory(torch.device("cpu"))
    assert 2**20 < available < 2**50


def test_advice_names_attention_where_its_weights_are_the_problem():
    arguments = dict(batch_size=2, max_prompt_tokens=4096)
    fits = estimate_memory(**arguments).total
    assert "pass --attention sdpa." in advise(fits, attention="eager", **arguments)


class TestCheck:
    """What is said before a run, with the memory that a machine has."""

    @pytest.fixture
    def check(self, monkeypatch):
        def check(available, **changes):
            monkeypatch.setattr("qwen_fused.qwen.memory.available_memory", lambda device: available)
            return check_memory(TrainConfig(**{"prove": False, **changes}), torch.device("cpu"))

        return check

    def test_says_the_estimate_of_the_run(self, check):
        # of this configuration, flag by flag
        flags = dict(batch_size=3, max_prompt_tokens=100, lora_rank=2, gradient_checkpointing=True, attention="eager")
        want = str(estimate_memory(**flags, dtype=torch.bfloat16))
        assert check(2**40, **flags, qwen_dtype="bfloat16", window_mode="recompute") == want
        assert check(None, window_mode="recompute") == str(estimate_memory())

    @pytest.mark.parametrize(("window", "visits", "batches"), [(10, 4, 3), (10, 1, 10), (2, 4, 1)])
    def test_counts_retained_graphs(self, check, window, visits, batches):
        flags = dict(prompt_window=window, prompt_visits=visits)
        assert check(None, window_mode="retain", **flags) == str(estimate_memory(retained_batches=batches))
        assert check(None, window_mode="recompute", **flags) == str(estimate_memory())

    def test_counts_the_proof_and_says_how_to_leave_it_out(self, check):
        # a step fits, and the proof, which takes more than these short prompts, does not
        flags = dict(batch_size=1, max_prompt_tokens=64, window_mode="recompute")
        step, proof = (estimate_memory(batch_size=1, max_prompt_tokens=64, prove=prove) for prove in (False, True))
        assert proof.total - proof.without_activations == 22 * step.weights // 4 > step.activations
        said = check(step.total, prove=True, **flags)
        assert said.startswith(f"{proof}\nWarning: ") and "its proof " in said and said.endswith("pass --no-prove.")
        assert "Warning" not in check(proof.total, prove=True, **flags)
        assert check(step.total, prove=True, resume=Path("run"), **flags) == str(step)

    def test_warns_where_only_the_longest_prompts_do_not_fit(self, check):
        need = estimate_memory()
        said = check(need.without_activations + 1, window_mode="recompute")
        assert said.startswith(str(need)) and "\nWarning: on cpu, at the longest prompts, " in said and "--" in said
        assert "Warning" not in check(need.total, window_mode="recompute")

    def test_refuses_what_cannot_fit(self, check):
        with pytest.raises(ValueError, match="not enough memory on cpu before any activation.* pass --lora-rank 16"):
            check(
                estimate_memory().without_activations - 1,
                batch_size=1,
                max_prompt_tokens=64,
                gradient_checkpointing=True,
            )

    def test_a_run_that_cannot_fit_stops_before_it_loads_anything(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr("qwen_fused.qwen.memory.available_memory", lambda device: 1000)
        monkeypatch.setattr("qwen_fused.train.loop.Trainer", lambda *a: pytest.fail("loaded"))
        assert main(["train", "--device", "cpu", "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "not enough memory" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_rejects_what_the_loader_rejects():
    with pytest.raises(ValueError, match="got no folder at '/nowhere'"):
        estimate_memory("/nowhere")
