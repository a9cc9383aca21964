"""Qwens as people have them, in a folder: trained from the command line, proved, exported, and loaded elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from demonstrations import DEMONSTRATIONS
from peft import AutoPeftModelForFeatureExtraction
from qwens import newer, qwen_tokenizer, save_qwen
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from qwen_fused.cli.main import main
from qwen_fused.qwen.prompt import QwenPrompt
from qwen_fused.qwen.tiny import byte_tokenizer
from qwen_fused.train.saved import load_model
from qwen_fused.train.trainer import Trainer

TEXT = "in:\n077\nout:\n70\n"
# architecture, tokenizer, flags
CASES = {
    "qwen2, bytes": ("qwen2", byte_tokenizer, ""),
    "qwen2.5, LoRA": ("qwen2.5", qwen_tokenizer, "--lora-rank 2 --gradient-checkpointing --pooling attention"),
    "qwen3, bf16": ("qwen3", qwen_tokenizer, "--qwen-dtype bfloat16 --window-mode retain --pooling attention"),
    "qwen3, eager": ("qwen3", byte_tokenizer, "--attention eager --precision bf16 --prompt-window 1"),
    "qwen2_moe": ("qwen2_moe", byte_tokenizer, ""),
    "qwen3_moe, LoRA": ("qwen3_moe", byte_tokenizer, "--lora-rank 2"),
    "qwen3_next, checkpointing": ("qwen3_next", byte_tokenizer, "--gradient-checkpointing"),
    "qwen3.5, bf16": ("qwen3.5", qwen_tokenizer, "--qwen-dtype bfloat16"),
    "qwen2.5, LoRA on bf16": ("qwen2.5", byte_tokenizer, "--lora-rank 2 --qwen-dtype bfloat16 --pooling last"),
}


@pytest.fixture(scope="module")
def few_arc(small_arc, tmp_path_factory) -> Path:
    """Five of the small tasks, so that what a run ends with takes no time."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(small_arc.iterdir())[:5]:
        shutil.copy(path, folder)
    return folder


def flags(few_arc, folder, out) -> list[str]:
    return (
        f"--qwen {folder} --dataset {few_arc} --val-fraction 0.25 --batch-size 4 --agent-channels 16 --prompt-dim 32 "
        f"--policy-hidden 32 --plan-steps 2 --device cpu --max-batches 4 --prompt-window 2 --ttt-seconds 0 --out {out}"
    ).split()


@pytest.mark.parametrize("case", CASES)
def test_trains_and_exports(case, few_arc, tmp_path, capsys):
    kind, tokenizer, more = CASES[case]
    saved = save_qwen(tmp_path / "qwen", kind, tokenizer())
    line = ["train", "--no-prove", *flags(few_arc, tmp_path / "qwen", tmp_path / "runs"), *more.split()]
    assert main(line) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert "Qwen needs about" in (run / "train.log").read_text()
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[-1]["qwen_grad"] > 0
    assert main(["export", str(run), str(tmp_path / "to")]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    loader = AutoPeftModelForFeatureExtraction if "lora" in more else AutoModel
    assert said == f'Exported: {loader.__module__.split(".")[0]}.{loader.__name__}.from_pretrained("{tmp_path / "to"}")'

    trained = load_model(run).prompt.backbone.eval()
    dtype = torch.bfloat16 if "bfloat16" in more else torch.float32
    # a saved adapter does not say in which type its base was
    plain = loader.from_pretrained(tmp_path / "to", **(dict(dtype=dtype) if "lora" in more else {})).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "to")(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want, got, before = (m(input_ids=ids).last_hidden_state for m in (trained, plain, saved.eval().model.to(dtype)))
    assert got.dtype == want.dtype == dtype
    # the export does not say how attention is computed
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if "eager" in more else 0)
    assert not torch.equal(before, want)


@pytest.mark.parametrize(
    "case",
    ["qwen2, bytes", "qwen2.5, LoRA", "qwen3, eager", "qwen2_moe", "qwen3_moe, LoRA", "qwen3_next, checkpointing"],
)
def test_is_proved(case, few_arc, tmp_path, capsys):
    kind, tokenizer, more = CASES[case]
    save_qwen(tmp_path / "qwen", kind, tokenizer())
    code = main(["prove", *flags(few_arc, tmp_path / "qwen", tmp_path / "runs"), *more.split()])
    assert code == 0, capsys.readouterr().out


def test_flags_reach_the_backbone(small_config, tmp_path):
    save_qwen(tmp_path, "qwen3")
    config = small_config(qwen=str(tmp_path), attention="eager", gradient_checkpointing=True, qwen_dtype="bfloat16")
    backbone = Trainer(config, tmp_path).model.prompt.backbone
    assert backbone.config._attn_implementation == "eager" and backbone.layers[0].gradient_checkpointing
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    adapted = Trainer(small_config(qwen=str(tmp_path), lora_rank=2), tmp_path).groups["qwen"]
    assert adapted and all("lora_" in name for name, _ in adapted)


def test_attention_changes_the_way_and_not_the_prompt(tmp_path):
    save_qwen(tmp_path, "qwen3")
    fused, plain = (QwenPrompt(str(tmp_path), attention=name).pooled(DEMONSTRATIONS) for name in ("sdpa", "eager"))
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_refuses_an_attention_that_is_not_here(few_arc, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qwen_fused.qwen.backbone.is_flash_attn_2_available", lambda: False)
    line = ["train", *flags(few_arc, "tiny", tmp_path / "runs"), "--attention", "flash_attention_2"]
    assert main([*line, "--qwen-dtype", "bfloat16"]) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA device and the package flash-attn" in said and said.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))
    # with it, it would not take float32
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == 2 and "sdpa or eager in float32" in capsys.readouterr().err


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_export_does_not_write_over_anything(make, tmp_path, capsys):
    make(tmp_path / "to")
    if (tmp_path / "to").is_dir():
        (tmp_path / "to" / "mine").touch()
    assert main(["export", str(tmp_path), str(tmp_path / "to")]) == 2
    assert "folder must be new or empty" in capsys.readouterr().err


def test_export_of_no_run(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "to")]) == 2
    assert "run must be a run folder with a config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_an_untied_head_is_exported_and_a_missing_one_told(few_arc, tmp_path, capsys):
    """A head of its own goes with the trained backbone; a base that has none is no language model afterwards."""
    base = save_qwen(tmp_path / "base", "qwen3")
    assert not base.config.tie_word_embeddings
    for name in ("base", "headless"):
        assert main(["train", "--no-prove", *flags(few_arc, tmp_path / name, tmp_path / f"runs-{name}")]) == 0
        (run,) = (tmp_path / f"runs-{name}").iterdir()
        capsys.readouterr()
        assert main(["export", str(run), str(tmp_path / f"to-{name}")]) == 0
        assert ("Without a language-model head" in capsys.readouterr().out) == (name == "headless")
        if name == "base":
            # what the first one hands on without its head
            load_model(run).prompt.backbone.save_pretrained(tmp_path / "headless")
            AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "headless")
    (run,) = (tmp_path / "runs-base").iterdir()
    trained = load_model(run).prompt.backbone.eval()
    found, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "to-base", output_loading_info=True)
    assert not loading["missing_keys"] and torch.equal(found.lm_head.weight, base.lm_head.weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = base.lm_head(trained(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(found.eval()(input_ids=ids).logits, want)


def test_a_model_with_pictures_is_told_its_text_model(tmp_path):
    config = newer("Qwen3_5Config")

    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'qwen3_5' in .*; its text model is 'qwen3_5_text': save it alone"):
        QwenPrompt(str(tmp_path))
