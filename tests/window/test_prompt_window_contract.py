"""What a window hands out, takes back and saves, on the smallest encode."""

import io

import pytest
import torch
from torch import nn
from window_table import Table

from qwen_fused.window.prompt_window import PromptWindow

BATCHES = [[0, 1, 2], [2, 3, 0, 3], [1, 0, 2]]


def test_each_prompt_is_computed_once():
    encode = Table()
    window = PromptWindow(encode, 3)
    for _ in range(2):
        encode.asked.clear()
        for batch in BATCHES:
            window.prompts(batch).sum().backward()
        asked = [keys for keys, _ in encode.asked]
        assert asked == [[0, 1, 2], [3]]
        assert window.flush() == 4
        assert [keys for keys, _ in encode.asked] == asked * 2 and all(graph for _, graph in encode.asked[2:])
    # once it is known what must stand still, nothing is kept of the first pass
    assert not any(graph for _, graph in encode.asked[:2])


def test_hands_out_leaves_with_the_values_of_encode():
    encode = Table().eval()
    window = PromptWindow(encode, 2)
    prompts = window.prompts([3, 1, 3])
    assert prompts.is_leaf and prompts.requires_grad and prompts.shape == (3, 4)
    assert torch.equal(prompts, encode.weight[[3, 1, 3]].square())
    with torch.no_grad():
        assert window.prompts([1]).requires_grad
    assert window.full


def test_adds_to_gradients_as_backward_does():
    encode = Table().eval()
    encode.weight.grad = torch.ones_like(encode.weight)
    window = PromptWindow(encode, 2)
    window.prompts([0, 1]).sum().backward()
    window.prompts([1, 1]).sum().backward()
    window.flush(scale=0.5)
    want = torch.ones_like(encode.weight)
    want[0] += 0.5 * 2 * encode.weight.detach()[0]
    want[1] += 0.5 * 3 * 2 * encode.weight.detach()[1]
    torch.testing.assert_close(encode.weight.grad, want)


def test_a_batch_can_be_rescaled_or_left_out():
    """As a loss scaler or a skipped batch needs it: what counts is the leaf's grad when flush comes."""
    encode = Table().eval()
    window = PromptWindow(encode, 3)
    first, second, third = (window.prompts([k]) for k in (0, 1, 2))
    (first.sum() * 1024).backward()
    first.grad /= 1024
    second.sum().backward()
    second.grad = None
    third.sum().backward()
    window.flush()
    used = encode.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [True, False, True] + [False] * 6
    torch.testing.assert_close(encode.weight.grad[0], 2 * encode.weight.detach()[0])


def test_two_losses_on_one_batch_add_up():
    encode = Table().eval()
    window = PromptWindow(encode, 1)
    prompts = window.prompts([2])
    prompts.sum().backward()
    (3 * prompts).sum().backward()
    window.flush()
    torch.testing.assert_close(encode.weight.grad[2], 4 * 2 * encode.weight.detach()[2])


def test_autocast_of_the_first_pass_holds_for_the_second():
    gradients = []
    for mode in ("recompute", "retain"):
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        data = torch.randn(4, 6)
        window = PromptWindow(lambda keys, layer=layer, data=data: layer(data[keys]), 2, mode=mode)
        for keys in ([0, 1], [2, 3]):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prompts = window.prompts(keys)
            assert prompts.dtype == torch.bfloat16
            prompts.float().square().sum().backward()
        window.flush()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def reload(state: dict) -> dict:
    """Through a file, without pickle execution."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_survives_twice():
    """A state of a resumed window, before its next batch, is the same state."""
    encode = Table()
    window = PromptWindow(encode, 4)
    window.prompts([0, 1]).sum().backward()
    first = window.state_dict()
    again = PromptWindow(encode, 4)
    again.load_state_dict(reload(first), keys=[0, 1])
    second = again.state_dict()
    assert second["batches"] == 1 and torch.equal(second["gradient"], first["gradient"])
    assert torch.equal(second["outputs"][0], first["outputs"][0])
    again.prompts([1, 2]).sum().backward()
    assert again.flush() == 3 and (encode.weight.grad[:2] != 0).any()


def test_state_does_not_move_with_the_window():
    window = PromptWindow(Table(), 4)
    prompts = window.prompts([0])
    prompts.sum().backward()
    state = window.state_dict()
    prompts.grad += 7
    assert state["gradient"].tolist() == [[1.0] * 4]


@pytest.mark.parametrize(
    ("keys", "size", "message"),
    [([0], 4, "the state's 2 prompts, got 1"), ([0, 1], 1, "at least the state's 2 batches, got 1")],
)
def test_rejects_a_state_that_does_not_fit(keys, size, message):
    window = PromptWindow(Table(), 4)
    window.prompts([0]).sum().backward()
    window.prompts([1]).sum().backward()
    with pytest.raises(ValueError, match=message):
        PromptWindow(Table(), size).load_state_dict(window.state_dict(), keys)


@pytest.mark.parametrize("mode", ["recompute", "retain"])
def test_a_sparse_gradient_on_the_leaf(mode):
    """As an embedding with sparse=True leaves one, whose table the prompts are."""
    encode = Table().eval()
    window = PromptWindow(encode, 1, mode=mode)
    rows = torch.tensor([1, 0, 1])
    nn.functional.embedding(rows, window.prompts([0, 2]), sparse=True).sum().backward()
    window.flush()
    want = torch.zeros_like(encode.weight)
    want[0], want[2] = 2 * encode.weight.detach()[0], 4 * encode.weight.detach()[2]
    torch.testing.assert_close(encode.weight.grad, want)
