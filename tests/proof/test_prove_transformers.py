"""A cut inside transformers, or in a hook that transformers calls, is told with the user's own line."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from proof_cases import marked, only_finding
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwen_fused.proof.prove import prove
from qwen_fused.qwen.tiny import tiny_config

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def qwen() -> PreTrainedModel:
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(64, intermediate_size=64, **shape)).train()


def test_generate_is_named_where_the_user_calls_it(qwen):
    soft = nn.Parameter(0.1 * torch.randn(2, 3, 32))

    def loss():
        tokens = qwen.generate(inputs_embeds=soft, max_new_tokens=2, do_sample=False)  # here
        return qwen(input_ids=IDS, labels=IDS).loss + tokens.float().mean()

    report = prove(loss, {"soft": soft})
    finding = only_finding(report, "connected", "decorated no_grad")
    assert finding.parameters == ("soft",)
    assert (report.cut.file, report.cut.line) == (__file__, marked(loss))
    assert "transformers/generation/utils.py" in str(report) and "GenerationMixin.generate" in str(report)


def test_a_hook_between_layers_is_named_at_its_own_line(qwen):
    def hook(module, given, out):
        return out[0].detach() if isinstance(out, tuple) else out.detach()  # here

    qwen.model.layers[1].register_forward_hook(hook)
    report = prove(lambda: qwen(input_ids=IDS, labels=IDS).loss, qwen)
    finding = only_finding(report, "connected", "detach")
    assert (report.cut.file, report.cut.line) == (__file__, marked(hook))
    # what comes behind the last layer still learns
    left = {name for name, _ in qwen.named_parameters()} - set(finding.parameters)
    assert left == {"model.norm.weight", "lm_head.weight"}


def test_a_healthy_causal_lm_is_proved(qwen):
    report = prove(lambda: qwen(input_ids=IDS, labels=IDS).loss, qwen, torch.optim.AdamW(qwen.parameters(), lr=1e-3))
    assert report.ok, str(report)
