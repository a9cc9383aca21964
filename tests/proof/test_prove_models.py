"""No false alarms: models as people have them, each proved from end to end, in the precisions they train in."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from qwen_fused.proof.prove import prove
from qwen_fused.qwen.backbone import enable_checkpointing

TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
IDS = torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(0))
X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 4


def assert_proved(report):
    assert report.ok and report.verdict == "proved", str(report)
    assert report.cut is None and report.findings == []
    # finite differences of a forward pass each: the bill must stay small
    assert report.evaluations <= 16


def optimizer_of(module, lr=1e-3):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)


def mlp(act=nn.ReLU, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), act(), nn.Linear(width, width), act(), nn.Linear(width, 4))


class WithHead(nn.Module):
    """A backbone pooled to one vector, and a head."""

    def __init__(self, backbone, width=32):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, 5)

    def forward(self, ids):
        return self.head(self.backbone(input_ids=ids).last_hidden_state.mean(1).float())


def qwen_loss(model, precision=None):
    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            out = model(IDS)
        return F.cross_entropy(out.float(), IDS[:, 0] % 5)

    return loss


def tiny_qwen(**more):
    torch.manual_seed(0)
    return Qwen2Model(Qwen2Config(**TINY, **more)).train()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_mlp(act, seed):
    torch.manual_seed(seed)
    model = mlp(act)
    assert_proved(prove(lambda: F.cross_entropy(model(X), Y), model, optimizer_of(model), seed=seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mlp_of_another_type(dtype):
    model = mlp().to(dtype)
    # bfloat16 keeps no step much smaller than a hundredth of the weight
    assert_proved(prove(lambda: F.cross_entropy(model(X.to(dtype)).float(), Y), model, optimizer_of(model, 1e-2)))


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_mlp_under_autocast(act):
    model = mlp(act)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(X).float(), Y)

    report = prove(loss, model, optimizer_of(model))
    assert_proved(report)
    assert "float64" in report.rungs["correct"].detail


def test_batch_norm_and_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4))
    assert_proved(prove(lambda: F.cross_entropy(model(X), Y), model, optimizer_of(model)))
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()


@pytest.mark.parametrize("kind", ["lstm", "attention", "convolution"])
def test_other_layers(kind):
    torch.manual_seed(0)
    if kind == "lstm":
        model = nn.LSTM(8, 12, num_layers=2, dropout=0.2, batch_first=True)
        loss = lambda: model(X[None])[0].square().mean()  # noqa: E731
    elif kind == "attention":
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        loss = lambda: model(X.view(4, 6, 8)).pow(3).mean()  # noqa: E731
    else:
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3))
        loss = lambda: model(X.view(3, 1, 8, 8)).square().mean()  # noqa: E731
    assert_proved(prove(loss, model, optimizer_of(model)))


@pytest.mark.parametrize("mode", ["plain", "dropout", "autocast", "checkpointed"])
def test_qwen(mode):
    model = WithHead(tiny_qwen(attention_dropout=0.2 if mode == "dropout" else 0.0))
    if mode == "checkpointed":
        enable_checkpointing(model.backbone)
    assert_proved(prove(qwen_loss(model, mode), model, optimizer_of(model)))


@pytest.mark.parametrize("mode", ["plain", "autocast", "checkpointed"])
def test_qwen_with_lora(mode):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1)
    backbone = get_peft_model(tiny_qwen(), config)
    if mode == "checkpointed":
        enable_checkpointing(backbone, use_reentrant=True)
        backbone.enable_input_require_grads()
    model = WithHead(backbone)
    report = prove(qwen_loss(model, mode), model, optimizer_of(model))
    assert_proved(report)
    # the adapters start with one side at zero, so the other side's gradient is zero at first
    assert "zero now but not one step on" in report.rungs["nonzero"].detail
    assert "frozen by peft" in report.rungs["declared"].detail


def test_adapter_frozen_by_mistake_is_still_found():
    from peft import LoraConfig, get_peft_model

    model = WithHead(get_peft_model(tiny_qwen(), LoraConfig(r=4, target_modules=["q_proj"])))
    frozen = [n for n, p in model.named_parameters() if "lora_B" in n and not p.requires_grad_(False).requires_grad]
    rung = prove(qwen_loss(model), model).rungs["declared"]
    assert [f.kind for f in rung.findings] == ["frozen"] and list(rung.parameters) == frozen


def test_tied_embeddings():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=True)).train()
    report = prove(lambda: model(input_ids=IDS, labels=IDS).loss, model, optimizer_of(model))
    assert_proved(report)
    assert "lm_head.weight" not in {name for row in report.layers for name in [row["layer"]]}


def test_unused_parameter_that_is_allowed():
    model = mlp()
    model.spare = nn.Linear(3, 3)
    loss = lambda: F.cross_entropy(model[4](model[:4](X)), Y)  # noqa: E731
    assert prove(loss, model, optimizer_of(model)).rungs["connected"].ok is False
    report = prove(loss, model, optimizer_of(model), allow=("spare.*",))
    assert_proved(report)
    assert report.allowed == {"spare.*": 2}


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding_with_unused_rows(sparse):
    torch.manual_seed(0)
    table = nn.Embedding(100, 8, sparse=sparse)
    assert_proved(prove(lambda: table(Y).square().mean(), table, torch.optim.SGD(table.parameters(), lr=0.1)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segment(reentrant):
    model = mlp()
    x = X.clone().requires_grad_()
    loss = lambda: F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), Y)  # noqa: E731
    assert_proved(prove(loss, model, optimizer_of(model)))
    assert x.grad is None


def test_scripted_module():
    model = torch.jit.script(mlp(nn.Tanh))
    assert_proved(prove(lambda: F.cross_entropy(model(X), Y), model, optimizer_of(model)))


def test_gradient_penalty():
    model = mlp(nn.Tanh)

    def loss():
        x = X.clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(out, Y) + slope.square().sum(1).mean()

    assert_proved(prove(loss, model, optimizer_of(model)))


def test_policy_gradient_with_its_intended_cuts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"policy": nn.Linear(8, 4), "value": nn.Linear(8, 1)})

    def loss():
        mean = model["policy"](X)
        action = mean + torch.randn_like(mean)
        log_prob = -0.5 * (action.detach() - mean).square().sum(1)
        reward = (action.argmax(1) == Y).float()
        value = model["value"](X).squeeze(1)
        advantage = (reward - value).detach()
        return -(log_prob * advantage).mean() + (value - reward).square().mean() + 0.1 * action.square().mean()

    report = prove(loss, model, optimizer_of(model), allow=("loss",))
    assert_proved(report)
    assert report.notes == [] and report.allowed["loss"] == 3


def test_hard_mask_changes_nothing():
    # the mask jumps when a prediction flips; autograd rightly takes it as constant, and so must the measurement
    model = mlp()

    def loss():
        logits = model(X)
        weight = 0.5 + 0.5 * (logits.argmax(1) != Y).float()
        return (weight * F.cross_entropy(logits, Y, reduction="none")).mean()

    for seed in range(4):
        assert_proved(prove(loss, model, optimizer_of(model), seed=seed))
