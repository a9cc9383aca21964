"""Loading a Qwen: true architectures from folders, LoRA, checkpointing, and one sentence for each way to fail."""

import json
import logging
import os

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForFeatureExtraction, PeftModel
from qwens import CONFIGS, qwen_tokenizer, save_qwen
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from qwen_fused.qwen.backbone import load_backbone, save_backbone
from qwen_fused.qwen.tiny import byte_tokenizer


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tokenizer", [byte_tokenizer, qwen_tokenizer])
def test_folder_gives_the_saved_hidden_states(kind, tokenizer, tmp_path):
    saved = save_qwen(tmp_path, kind, tokenizer())
    backbone, read = load_backbone(str(tmp_path))
    ids = read("in:\n077\nout:\n70 the end\n", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenizer()("in:\n077\nout:\n70 the end\n", return_tensors="pt")["input_ids"])
    assert backbone.training
    with torch.no_grad():
        want = saved.eval().model(ids).last_hidden_state
        got = backbone.eval()(ids).last_hidden_state
    assert torch.equal(got, want)


def test_half_precision_weights(tmp_path):
    save_qwen(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in load_backbone(str(tmp_path))[0].parameters()} == {torch.float32}
    backbone, _ = load_backbone(str(tmp_path), dtype=torch.bfloat16, lora_rank=2)
    kinds = {p.requires_grad: p.dtype for p in backbone.parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}


@pytest.mark.parametrize("kind", ["tiny", "qwen2.5", "qwen3", "qwen3_moe"])
def test_lora_adapters_all_learn_from_the_first_step(kind, tmp_path):
    if kind != "tiny":
        save_qwen(tmp_path, kind)
    source = kind if kind == "tiny" else str(tmp_path)
    plain, tokenizer = load_backbone(source)
    backbone, _ = load_backbone(source, lora_rank=4)
    ids = tokenizer("in:\n0123456789\nout:\n98\n", return_tensors="pt")["input_ids"]
    hidden = backbone(input_ids=ids).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    trained = {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    # experts and their router are adapted in ways that differ between versions of peft
    if kind != "qwen3_moe":
        assert len(trained) == 2 * 7 * plain.config.num_hidden_layers
    assert [name for name, grad in trained.items() if not grad.norm() > 0] == []
    change = (hidden - plain(input_ids=ids).last_hidden_state).norm() / hidden.norm()
    assert 0 < change < 0.02


def test_attention_implementation(tmp_path):
    save_qwen(tmp_path)
    hidden = {}
    for attention in ("sdpa", "eager"):
        backbone, tokenizer = load_backbone(str(tmp_path), attention=attention)
        assert backbone.config._attn_implementation == attention
        ids = tokenizer("in:\n077\n", return_tensors="pt")["input_ids"]
        hidden[attention] = backbone(input_ids=ids).last_hidden_state
    assert load_backbone(str(tmp_path))[0].config._attn_implementation == "sdpa"
    torch.testing.assert_close(hidden["eager"], hidden["sdpa"])


def test_moves_no_global_generator(tmp_path):
    save_qwen(tmp_path)
    before = torch.get_rng_state()
    first, second = (load_backbone(str(tmp_path), lora_rank=2, seed=5)[0].state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def one_sentence(error: ValueError) -> bool:
    """One line, and no other error's traceback before it."""
    hidden = error.__context__ is None or error.__suppress_context__
    return "\n" not in str(error) and error.__cause__ is None and hidden


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: LlamaConfig().save_pretrained(folder), "qwen3_moe, qwen3_next, .* got 'llama'"),
        (lambda folder: os.remove(folder / "config.json"), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: os.remove(folder / "model.safetensors"), "do not load"),
        (drop_tensor, "lack 1 tensors, layers.1.mlp.up_proj.weight"),
        (lambda folder: edit_config(folder, hidden_size=36), "do not load"),
        (
            lambda folder: edit_config(folder, quantization_config={"quant_method": "bitsandbytes"}),
            r"are quantized \(bitsandbytes\), .* pass the Qwen that they were made from",
        ),
        (lambda folder: edit_config(folder, quantization_config={"bits": 4}), "by an unnamed method"),
        (lambda folder: os.remove(folder / "tokenizer.json"), "cannot spell a grid"),
        (lambda folder: byte_tokenizer([f"<{i}>" for i in range(99)]).save_pretrained(folder), "356 tokens"),
    ],
)
def test_a_damaged_folder_gives_one_sentence(damage, message, tmp_path):
    save_qwen(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(str(tmp_path))
    assert one_sentence(caught.value)


@pytest.mark.parametrize("missing", ["/no/such/folder", "./nowhere", "~/no/such", "a/b/c", ""])
def test_a_missing_path_is_not_looked_up(missing, monkeypatch):
    monkeypatch.setattr("qwen_fused.qwen.backbone.AutoConfig.from_pretrained", lambda *a, **k: pytest.fail("looked"))
    with pytest.raises(ValueError, match=f"got no folder at '{missing}'"):
        load_backbone(missing)


def test_an_unreachable_hub_gives_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(ValueError, match="neither a folder here nor a model that the hub gives us") as caught:
        load_backbone("no-such-owner/no-such-qwen")
    assert one_sentence(caught.value)
    assert logging.getLogger("huggingface_hub").level == level and not caplog.records


def test_never_runs_code_of_a_model(tmp_path):
    save_qwen(tmp_path)
    edit_config(tmp_path, model_type="other", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ValueError):
        load_backbone(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("qwen", ["tiny", "folder"])
@pytest.mark.parametrize(
    ("attention", "message"),
    [("flash", "must be one of sdpa, eager, flash_attention_2"), ("flash_attention_2", "needs a CUDA device")],
)
def test_an_attention_that_is_not_here_gives_one_sentence(qwen, attention, message, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_fused.qwen.backbone.is_flash_attn_2_available", lambda: False)
    if qwen == "folder":
        save_qwen(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone("tiny" if qwen == "tiny" else str(tmp_path), attention=attention)
    assert one_sentence(caught.value)


def test_rejects_negative_rank():
    with pytest.raises(ValueError, match="lora_rank must be 0 or more, got -1"):
        load_backbone(lora_rank=-1)


TEXT = "in:\n077\nout:\n70\n"


def train_a_little(backbone, tokenizer) -> torch.Tensor:
    """Move every trainable weight; return the token ids of TEXT."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    backbone(input_ids=ids).last_hidden_state.square().sum().backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1e-3).step()
    return ids


@pytest.mark.parametrize("kind", ["tiny", "qwen2.5", "qwen3"])
def test_a_trained_backbone_loads_in_plain_transformers(kind, tmp_path):
    if kind != "tiny":
        save_qwen(tmp_path / "from", kind)
    backbone, tokenizer = load_backbone("tiny" if kind == "tiny" else str(tmp_path / "from"))
    ids = train_a_little(backbone, tokenizer)
    want = backbone(input_ids=ids).last_hidden_state
    save_backbone(backbone, tokenizer, tmp_path / "to")
    plain = AutoModel.from_pretrained(tmp_path / "to")
    read = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert type(plain) is type(backbone) and torch.equal(read(TEXT, return_tensors="pt")["input_ids"], ids)
    assert torch.equal(plain(input_ids=ids).last_hidden_state, want)
    # and here again, as a folder like any other
    again, _ = load_backbone(str(tmp_path / "to"))
    assert torch.equal(again(input_ids=ids).last_hidden_state, want)


@pytest.mark.parametrize("kind", ["tiny", "qwen2.5"])
def test_trained_adapters_load_in_plain_peft(kind, tmp_path):
    if kind != "tiny":
        save_qwen(tmp_path / "from", kind)
    backbone, tokenizer = load_backbone("tiny" if kind == "tiny" else str(tmp_path / "from"), lora_rank=3)
    ids = train_a_little(backbone, tokenizer)
    want = backbone(input_ids=ids).last_hidden_state
    # a second export must not lean on the first
    for name in ("first", "to"):
        save_backbone(backbone, tokenizer, tmp_path / name)
    by_name = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "to")
    assert torch.equal(by_name(input_ids=ids).last_hidden_state, want)
    base = by_name.active_peft_config.base_model_name_or_path
    assert base == str(tmp_path / ("to/base" if kind == "tiny" else "from"))
    onto = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "to")
    assert torch.equal(onto(input_ids=ids).last_hidden_state, want)
    with onto.disable_adapter():
        assert not torch.equal(onto(input_ids=ids).last_hidden_state, want)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_while_weights_load_is_told_as_such(error, tmp_path, monkeypatch, capsys):
    """As every other out of memory: with what to do, code 1, and not as weights that are damaged."""
    from qwen_fused.cli.main import main

    save_qwen(tmp_path / "qwen")

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("qwen_fused.qwen.backbone.AutoModel.from_pretrained", full)
    assert main(["train", "--qwen", str(tmp_path / "qwen"), "--out", str(tmp_path / "runs"), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qwen-fused: hint: ") and "--qwen-dtype bfloat16" in said and "do not load" not in said
    assert not list((tmp_path / "runs").glob("*"))
