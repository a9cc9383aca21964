"""No pass through Qwen waits for the device, and attention is as causal as with the mask that is left out."""

from __future__ import annotations

import pytest
import torch
import transformers
from blocking import blocking_reads
from demonstrations import DEMONSTRATIONS
from qwens import qwen_tokenizer, save_qwen

from qwen_fused.qwen import prompt as prompt_module
from qwen_fused.qwen.causal import causal_without_mask
from qwen_fused.qwen.prompt import QwenPrompt


@pytest.fixture(params=["tiny", "qwen2.5", "qwen3"])
def qwen(request, tmp_path) -> str:
    if request.param == "tiny":
        return "tiny"
    save_qwen(tmp_path, request.param, qwen_tokenizer())
    return str(tmp_path)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_pass_reads_nothing_and_equals_one_with_masks(qwen, lora_rank: int, monkeypatch) -> None:
    prompt = QwenPrompt(qwen, dim=16, lora_rank=lora_rank)
    with blocking_reads() as seen:
        found = prompt(DEMONSTRATIONS).text_embedding
        found.square().sum().backward()
    assert not seen
    gradients = {name: p.grad.clone() for name, p in prompt.named_parameters() if p.grad is not None}
    prompt.zero_grad()
    # left to itself, the library looks at the positions; transformers 4 did not
    monkeypatch.setattr(prompt_module, "causal_without_mask", lambda config, tokens: None)
    with blocking_reads() as seen:
        expected = prompt(DEMONSTRATIONS).text_embedding
        expected.square().sum().backward()
    assert bool(seen) == (int(transformers.__version__.split(".")[0]) >= 5)
    assert all("masking_utils" in line for line in seen)
    # transformers 4 hands SDPA a mask, and with it another kernel
    torch.testing.assert_close(found, expected)
    again = {name: p.grad for name, p in prompt.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, again)


def test_the_model_makes_its_masks_where_no_mask_is_not_causal(tmp_path) -> None:
    saved = save_qwen(tmp_path, "qwen2.5", qwen_tokenizer()).config
    assert causal_without_mask(saved, 1000) == {"full_attention": None}
    saved.layer_types = ["full_attention", "sliding_attention"]
    saved.sliding_window = 64
    assert causal_without_mask(saved, 63) == {"full_attention": None, "sliding_attention": None}
    assert causal_without_mask(saved, 64) is None
    eager = QwenPrompt(str(tmp_path), dim=16, attention="eager")
    assert causal_without_mask(eager.backbone.config, 10) is None
    # as the other implementation gives it, which a forgotten mask would change
    sdpa = QwenPrompt(str(tmp_path), dim=16)
    torch.testing.assert_close(
        eager(DEMONSTRATIONS).text_embedding, sdpa(DEMONSTRATIONS).text_embedding, rtol=1e-4, atol=1e-5
    )
