"""Small models and data for other people's training loops, and what their tests look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM


class Counting(Dataset):
    """Sequences that count upwards from a random start."""

    def __init__(self, size: int = 64, length: int = 8):
        starts = torch.randint(64, (size, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (starts + torch.arange(length)) % 64

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def counting_qwen() -> Qwen2ForCausalLM:
    """A Qwen2 of two layers that reads `Counting`, with dropout, so that random numbers count."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=2, attention_dropout=0.1))


def weights(model: nn.Module) -> Tensor:
    """Every parameter and buffer in one vector."""
    return torch.cat([value.detach().double().flatten().clone() for value in model.state_dict().values()])
