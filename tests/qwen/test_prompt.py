"""The prompt reads every demonstration cell and nothing else, through one backbone that gradient reaches everywhere."""

import inspect

import numpy as np
import pytest
import torch
from demonstrations import DEMONSTRATIONS, mean_features, pair, text_of
from qwens import exact_norms, qwen_tokenizer, save_qwen  # noqa: F401
from torch import nn
from transformers import AutoModel, PreTrainedModel

from qwen_fused.arc.episodes import Pair
from qwen_fused.arc.features import FEATURES, normalise
from qwen_fused.qwen.pooling import POOLINGS
from qwen_fused.qwen.prompt import TOKENS_PER_FORWARD, QwenPrompt, group_by_length


@pytest.fixture(scope="module")
def prompt() -> QwenPrompt:
    return QwenPrompt(dim=24, seed=1)


def test_shapes_and_hybrid(prompt):
    out = prompt(DEMONSTRATIONS)
    assert out.prompt.shape == out.text_embedding.shape == out.control.shape == (3, 24)
    assert out.features.shape == (3, len(FEATURES)) and not out.features.requires_grad
    assert torch.equal(out.prompt, 0.5 * out.text_embedding + 0.5 * out.control)
    want = np.stack([normalise(mean_features(pairs)) for pairs in DEMONSTRATIONS])
    assert np.array_equal(out.features.numpy(), want)
    assert out.truncated == 0.0


def test_pooled_state_stands_in_for_the_pass(prompt):
    out = prompt(DEMONSTRATIONS)
    pooled = prompt.pooled([tuple(pairs) for pairs in DEMONSTRATIONS]).detach().requires_grad_()
    assert pooled.shape == (3, prompt.backbone.config.hidden_size) and pooled.dtype == torch.float32
    prompt.zero_grad()
    again = prompt(DEMONSTRATIONS, pooled)
    assert torch.equal(again.prompt, out.prompt) and again.truncated == out.truncated
    again.prompt.square().sum().backward()
    assert pooled.grad.norm() > 0 and all(p.grad is None for p in prompt.backbone.parameters())
    with pytest.raises(ValueError, match=r"pooled must be \[3, 192\], got \(2, 192\)"):
        prompt(DEMONSTRATIONS, pooled[:2])


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5", "qwen3", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_text_is_the_pooled_hidden_state_of_the_whole_text(kind, pooling, tmp_path):
    saved = save_qwen(tmp_path, kind, qwen_tokenizer())
    prompt = QwenPrompt(str(tmp_path), dim=16, pooling=pooling)
    plain = AutoModel.from_pretrained(tmp_path)
    assert isinstance(prompt.backbone, type(plain)) and prompt.backbone.training
    for pairs, got in zip(DEMONSTRATIONS, prompt(DEMONSTRATIONS).text_embedding, strict=True):
        # one tokenisation of the whole text, through the saved model: no padding, no pieces
        ids = torch.tensor([qwen_tokenizer()(text_of(pairs))["input_ids"]])
        hidden = saved.eval().model(ids).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        torch.testing.assert_close(got, prompt.projection(pooled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_alone_equals_the_same_prompt_in_a_batch(pooling):
    prompt = QwenPrompt(dim=16, pooling=pooling)
    with torch.no_grad():
        together = prompt(DEMONSTRATIONS).prompt
        alone = torch.cat([prompt([pairs]).prompt for pairs in DEMONSTRATIONS])
        turned = prompt(DEMONSTRATIONS[::-1]).prompt.flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, turned, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_group_by_length(monkeypatch, prompt):
    lengths = [5, 400, 30, 512, 7, 399]
    groups = group_by_length(lengths, 800)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert [sorted(group) for group in groups] == [[3], [1, 5], [0, 2, 4]]
    with torch.no_grad():
        want = prompt(DEMONSTRATIONS).prompt
        monkeypatch.setitem(TOKENS_PER_FORWARD, "cpu", 1)
        assert group_by_length([3, 3], 1) == [[0], [1]]
        torch.testing.assert_close(prompt(DEMONSTRATIONS).prompt, want, rtol=1e-4, atol=1e-5)


def test_every_demonstration_cell_changes_the_prompt(prompt):
    pairs = [pair(6, 3, 4), pair(7, 2, 3, output=(1, 2))]
    with torch.no_grad():
        want = prompt([pairs])
        for index, which in ((0, "input"), (0, "output"), (1, "input"), (1, "output")):
            for cell in np.ndindex(getattr(pairs[index], which).shape):
                grids = {"input": pairs[index].input.copy(), "output": pairs[index].output.copy()}
                grids[which][cell] = (grids[which][cell] + 1) % 10
                changed = [*pairs]
                changed[index] = Pair(**grids)
                got = prompt([changed])
                assert not torch.allclose(got.text_embedding, want.text_embedding, rtol=0, atol=1e-6), (
                    index,
                    which,
                    cell,
                )


def test_the_query_and_its_answer_have_no_way_in():
    assert list(inspect.signature(QwenPrompt.forward).parameters) == ["self", "demonstrations", "pooled"]
    assert list(inspect.signature(QwenPrompt.pooled).parameters) == ["self", "demonstrations"]
    # a pair without its output cannot stand for a demonstration, so the query's pair cannot slip in either
    with pytest.raises(ValueError, match="got a pair without in episode 1"):
        QwenPrompt(dim=8)([[pair(0)], [pair(0), Pair(pair(1).input, None)]])


@pytest.mark.parametrize("demonstrations", [[], [[pair(0)], []]])
def test_rejects_nothing_to_read(prompt, demonstrations):
    with pytest.raises(ValueError, match="at least one"):
        prompt(demonstrations)


def test_same_seed_same_module_and_no_global_draw():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = QwenPrompt(dim=16, seed=7, lora_rank=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    second, other = QwenPrompt(dim=16, seed=7, lora_rank=2), QwenPrompt(dim=16, seed=8, lora_rank=2)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert torch.equal(first(DEMONSTRATIONS).prompt, second(DEMONSTRATIONS).prompt)
    assert not torch.equal(first(DEMONSTRATIONS).prompt, other(DEMONSTRATIONS).prompt)


def gradients(prompt: QwenPrompt) -> dict[str, torch.Tensor]:
    """Gradients of a loss that weighs every entry of the prompt differently."""
    prompt.zero_grad()
    out = prompt(DEMONSTRATIONS).prompt
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in prompt.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["tiny", "qwen2", "qwen2.5", "qwen3"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradient_reaches_every_parameter(kind, pooling, tmp_path):
    if kind != "tiny":
        save_qwen(tmp_path, kind)
    prompt = QwenPrompt("tiny" if kind == "tiny" else str(tmp_path), dim=16, pooling=pooling)
    grads = gradients(prompt)
    assert [name for name, grad in grads.items() if not (grad.isfinite().all() and grad.norm() > 0)] == []
    assert {name for name, _ in prompt.named_parameters()} == set(grads)
    qwen, head = list(prompt.backbone.parameters()), [*prompt.projection.parameters(), *prompt.control.parameters()]
    head += [*prompt.queries.parameters()] if prompt.queries else []
    assert len({id(p) for p in qwen + head}) == len(qwen) + len(head) == len(list(prompt.parameters()))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_gradient_is_the_derivative(kind, tmp_path, exact_norms):  # noqa: F811
    save_qwen(tmp_path, kind)
    prompt = QwenPrompt(str(tmp_path), dim=8, dtype=torch.float64).double()
    weight = torch.linspace(-1, 2, 3 * 8, dtype=torch.float64).view(3, 8)

    def loss() -> torch.Tensor:
        return (prompt(DEMONSTRATIONS).prompt * weight).sum()

    for parameter in (prompt.backbone.layers[0].self_attn.k_proj.weight, prompt.backbone.norm.weight):
        direction = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter)
        (grad,) = torch.autograd.grad(loss(), parameter)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            below = loss()
        assert (grad * direction).sum() == pytest.approx(float(above - below) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_checkpointing_gives_the_same_gradients(lora_rank):
    plain, lean = (QwenPrompt(dim=16, lora_rank=lora_rank, gradient_checkpointing=lean) for lean in (False, True))
    calls = []
    lean.backbone.get_submodule("base_model.model" if lora_rank else "").layers[0].self_attn.register_forward_hook(
        lambda *args: calls.append(1)
    )
    want, got = gradients(plain), gradients(lean)
    # once forward, once more while the gradient comes back
    assert len(calls) == 2 and want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)


def test_lora_trains_adapters_and_heads_only():
    prompt = QwenPrompt(dim=16, lora_rank=4)
    frozen = {name: p.clone() for name, p in prompt.named_parameters() if not p.requires_grad}
    grads = gradients(prompt)
    adapters = [name for name in grads if name.startswith("backbone.")]
    assert len(adapters) == 4 * 7 * 2 and all("lora_" in name for name in adapters)
    assert sum(p.requires_grad for p in prompt.backbone.parameters()) == len(adapters)
    assert all(grad.norm() > 0 for grad in grads.values())
    torch.optim.AdamW(prompt.parameters(), lr=0.1).step()
    assert frozen and all(torch.equal(dict(prompt.named_parameters())[name], value) for name, value in frozen.items())


def test_half_precision_backbone():
    prompt, full = QwenPrompt(dim=16, dtype=torch.bfloat16), QwenPrompt(dim=16)
    assert {p.dtype for p in prompt.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for m in (prompt.projection, prompt.control) for p in m.parameters()} == {torch.float32}
    out = prompt(DEMONSTRATIONS).text_embedding
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full(DEMONSTRATIONS).text_embedding, rtol=0, atol=0.1)


def test_autocast_keeps_pooling_and_prompt_in_float32(prompt):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prompt(DEMONSTRATIONS)
    assert out.prompt.dtype == out.control.dtype == torch.float32
    torch.testing.assert_close(out.text_embedding, prompt(DEMONSTRATIONS).text_embedding, rtol=0, atol=0.1)


def test_one_backbone_no_head(prompt):
    assert [type(m) for m in prompt.modules() if isinstance(m, PreTrainedModel)] == [type(prompt.backbone)]
    vocabulary = [m for m in prompt.modules() if isinstance(m, nn.Embedding)]
    widths = {m.out_features for m in prompt.modules() if isinstance(m, nn.Linear)}
    assert len(vocabulary) == 1 and len(prompt.tokenizer) not in widths


def test_weights_survive_a_state_dict(prompt):
    other = QwenPrompt(dim=24, seed=2)
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(other(DEMONSTRATIONS).prompt, prompt(DEMONSTRATIONS).prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(pooling="max"), "pooling must be one of mean, last, attention, got 'max'"),
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(max_prompt_tokens=3), "got 3"),
        (dict(max_prompt_tokens=9000), "got 9000"),
        (dict(qwen="/nowhere"), "got no folder at '/nowhere'"),
        (dict(lora_rank=-1), "lora_rank"),
    ],
)
def test_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QwenPrompt(**arguments)
