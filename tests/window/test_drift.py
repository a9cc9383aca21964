"""What passes for the same prompt: rounding of the type that encode computes in, and no more."""

import pytest
import torch
from torch import nn

from qwen_fused.window.drift import Drift, bound, narrowest_dtype
from qwen_fused.window.prompt_window import PromptWindow

CPU = torch.device("cpu")
BOUNDS = {torch.float64: 5.7e-14, torch.float32: 3.1e-5, torch.float16: 3.9e-3, torch.bfloat16: 2.0e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_table_at_the_head_of_the_file(dtype):
    assert bound(dtype, CPU) == pytest.approx(BOUNDS[dtype], rel=0.02)
    wide = dtype in (torch.float32, torch.float64)
    assert bound(dtype, torch.device("cuda")) == bound(dtype, CPU) * (8 if wide else 1)


def flush_after(change: float, dtype: torch.dtype, rows: int = 1) -> None:
    """A window whose first prompt is another by that share of its norm when it is flushed."""
    table = nn.Parameter(torch.ones(rows, 16, dtype=dtype))
    # half precision can't hold the change: its first pass is off in float32
    factor = torch.ones(rows, 16, dtype=torch.float64)
    factor[0, 0] += 4 * change
    first = [True]

    def encode(keys):
        out = table[keys].float() if dtype in (torch.float16, torch.bfloat16) else table[keys]
        return out if not first[0] else out * factor.to(out.dtype)

    window = PromptWindow(encode, 1)
    window.prompts(list(range(rows))).sum().backward()
    first[0] = False
    window.flush()


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_change_is_seen_above_its_bound_alone(dtype, rows):
    """Of one prompt, however many others there are, and in float32 outputs of half-precision weights too."""
    if dtype != torch.float64:
        flush_after(0.8 * BOUNDS[dtype], dtype, rows)
    with pytest.raises(RuntimeError, match="encode gives other prompts than it handed out, .* of their norm apart"):
        flush_after(1.3 * BOUNDS[dtype], dtype, rows)


def test_four_parts_in_a_thousand_are_refused_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 5))
    window = PromptWindow(lambda keys: model(torch.tensor(keys)), size=1)
    window.prompts([1, 2]).square().sum().backward()
    # behind autograd's back
    model[1].weight.data.add_(1e-3)
    with pytest.raises(RuntimeError, match="changed inside the window"):
        window.flush()
    assert model[1].weight.grad is None


@pytest.mark.parametrize("before, again, passes", [(0.0, 0.0, True), (0.0, 1.0, False), (1.0, float("nan"), False),
                                                   (float("nan"), float("nan"), True)])  # fmt: skip
def test_nothing_and_nan(before, again, passes):
    again, before = torch.full((2, 3), again, requires_grad=True), torch.full((2, 3), before)
    if passes:
        Drift().compare(again, before)
        return
    with pytest.raises(RuntimeError, match="other prompts"):
        Drift().compare(again, before)


def test_several_vectors_are_one_prompt():
    """What is next to nothing in all of a key's vectors is measured by the rest of them."""
    before = torch.tensor([[[10.0, 1e-4], [10.0, 1e-4]]])
    Drift().compare((before + 1e-4).requires_grad_(), before)
    with pytest.raises(RuntimeError, match="other prompts"):
        Drift().compare((before + 1e-2).requires_grad_(), before)


def test_the_narrowest_type_of_a_graph():
    x, half = torch.ones(2, 3, requires_grad=True), nn.Linear(3, 3).bfloat16()
    assert narrowest_dtype(x.double() * 2) == torch.float32
    assert narrowest_dtype(half(x.bfloat16()).float()) == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrowest_dtype((nn.Linear(3, 3)(x)).float()) == torch.bfloat16
    # frozen weights, as under adapters
    half.requires_grad_(False)
    assert narrowest_dtype(half(x.bfloat16()).float()) == torch.bfloat16
    assert narrowest_dtype(x.double().requires_grad_().half().double()) == torch.float16
