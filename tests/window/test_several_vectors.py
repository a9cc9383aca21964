"""Several vectors a key, [n, K, D]: what a planner that attends to its prompt is handed."""

import pytest
import torch
from torch import Tensor, nn

from qwen_fused.window.prompt_window import PromptWindow

BATCHES = [[0, 1, 2], [2, 3, 0, 3], [1, 0, 2]]


class Vectors(nn.Module):
    """K vectors a key, of learned queries over the states of a text: [n, K, D]."""

    def __init__(self):
        super().__init__()
        self.states = nn.Linear(3, 5)
        self.queries = nn.Parameter(torch.randn(4, 5))

    def forward(self, keys: list[int]) -> Tensor:
        text = torch.sin(torch.arange(7.0).view(7, 1) + torch.arange(3.0) + torch.tensor(keys).view(-1, 1, 1))
        states = self.states(text.to(self.queries.dtype)).tanh()
        weight = (states @ self.queries.t()).softmax(1)
        return weight.transpose(1, 2) @ states


@pytest.mark.parametrize("mode", ["recompute", "retain"])
def test_several_vectors_a_key_are_exact_too(mode):
    """A planner whose states attend to [B, K, D]: float64 gradients of the window and of batches without it."""
    torch.manual_seed(0)
    encode, states = Vectors().double(), torch.randn(4, 6, 5, dtype=torch.float64)

    def loss(vectors: Tensor) -> Tensor:
        look = (states[: len(vectors)] @ vectors.transpose(1, 2)).softmax(2)
        return (look @ vectors).tanh().square().sum()

    sum(loss(encode(batch)) for batch in BATCHES).backward()
    want = [p.grad.clone() for p in encode.parameters()]
    encode.zero_grad()
    window = PromptWindow(encode, len(BATCHES), mode=mode)
    for number, batch in enumerate(BATCHES):
        vectors = window.prompts(batch)
        assert vectors.shape == (len(batch), 4, 5) and vectors.is_leaf
        loss(vectors).backward()
        if number == 0:
            # a window that goes on in another process
            state, window = window.state_dict(), PromptWindow(encode, len(BATCHES))
            window.load_state_dict(state, batch)
    assert window.flush() == 4
    for parameter, gradient in zip(encode.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)
