"""With Qwen's own tokenizer: a cell is one token, rows never merge; and a Qwen of 0.5B's true width from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from qwens import save_qwen
from real_tokenizer import real_tokenizer
from transformers import AutoModel, AutoTokenizer, Qwen2Config

from qwen_fused.arc.episodes import load_tasks
from qwen_fused.arc.features import RULES
from qwen_fused.cli.main import main
from qwen_fused.qwen.prompt_text import INPUT, OUTPUT, PromptText, grid_text

# Qwen2.5-0.5B's width, heads and vocabulary; two of its 24 layers
TRUE_SHAPE = dict(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=32_768, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (7, 13), (30, 30)])
def test_a_cell_is_one_token_and_rows_never_merge(shape):
    tokenizer, grid = real_tokenizer(), np.random.default_rng(0).integers(0, 10, shape)
    for text in (INPUT, OUTPUT):
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text + grid_text(grid))["input_ids"])
        assert pieces[:2] == [text[:-2], ":Ċ"]
        assert pieces[2:] == [piece for row in grid for piece in [*map(str, row), "Ċ"]]


def test_lengths_of_prompts_are_counted_cells():
    text = PromptText(real_tokenizer(), 10_000, 32_768)
    for task in load_tasks("arc1").tasks[:40]:
        (encoded,) = text.encode([task.train])
        grids = [grid for pair in task.train for grid in (pair.input, pair.output)]
        cells = sum(grid.size + grid.shape[0] for grid in grids)
        # a marker is two tokens; a rule of at most 25 words and its newline
        assert 5 < len(encoded.ids) - cells - 2 * len(grids) < 30
    assert len({tuple(ids) for ids in text.rule_ids.values()}) == len(RULES)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--lora-rank 4 --qwen-dtype bfloat16 --gradient-checkpointing"])
def test_true_shape_from_end_to_end(more, small_arc, tmp_path, monkeypatch, capsys):
    """Train, prove, evaluate, solve, export and resume."""
    monkeypatch.setitem(save_qwen.__globals__["CONFIGS"], "true", lambda: Qwen2Config(**TRUE_SHAPE))
    save_qwen(tmp_path / "qwen", "true", real_tokenizer())
    flags = (
        f"--qwen {tmp_path / 'qwen'} --dataset {small_arc} --val-fraction 0.25 --batch-size 2 --agent-channels 16 "
        f"--prompt-dim 32 --policy-hidden 32 --plan-steps 2 --device cpu --max-batches 2 --prompt-window 2 "
        f"--ttt-seconds 0 --trackers none --window-mode recompute --out {tmp_path / 'runs'} {more}"
    ).split()
    assert main(["train", *flags]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    said = (run / "train.log").read_text()
    assert "gradient proved" in said and "nan" not in said
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["qwen_grad"] > 0
    assert main(["train", "--resume", str(run), "--max-batches", "3"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    line = ["solve", str(small_arc), "--run", str(run), "--limit", "1", "--ttt-steps", "2", "--workers", "1"]
    assert main([*line, "--out", str(tmp_path / "solve"), "--device", "cpu"]) == 0
    assert main(["export", str(run), str(tmp_path / "to")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "to")
    assert tokenizer("in:\n07\n")["input_ids"] == real_tokenizer()("in:\n07\n")["input_ids"]
    if not more:
        assert AutoModel.from_pretrained(tmp_path / "to").config.hidden_size == 896
