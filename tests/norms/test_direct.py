"""Gradients that the extension finds itself: the same bits as by Python's look at each, which all others go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_fused.norms import group_grad_norm as module
from qwen_fused.norms.group_grad_norm import GroupGradNorm

pytestmark = pytest.mark.skipif(module.COMPILED is None, reason="the extension is not here, or older")


def parameters(count: int = 12, missing: tuple[int, ...] = ()) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(3, 5, dtype=torch.float64 if n % 5 == 4 else torch.float32)) for n in range(count)]
    for n, p in enumerate(made):
        if n not in missing:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return made


def norms_of(made: list[nn.Parameter]) -> GroupGradNorm:
    return GroupGradNorm({"a": made[:5], "b": {"c": made[5:7], "d": made[7:]}})


def by_the_long_way(monkeypatch) -> None:
    monkeypatch.setattr(module, "_is_direct", lambda: False)


def refused(*_: object, **__: object) -> None:
    raise AssertionError("the long way was taken")


@pytest.mark.parametrize("inv_scale", [None, 0.5, 2, torch.tensor(0.25)])
@pytest.mark.parametrize("missing", [(), (0,), (3, 4, 5, 11), tuple(range(7)), tuple(range(5, 12))])
def test_the_same_bits(monkeypatch, missing: tuple[int, ...], inv_scale: object) -> None:
    direct, other = parameters(missing=missing), parameters(missing=missing)
    for made in (direct, other):
        if 8 not in missing:
            made[8].grad[1, 1] = torch.nan
    with monkeypatch.context() as patch:
        patch.setattr(GroupGradNorm, "_gather", refused)
        norms = norms_of(direct)
        stats = norms.measure(inv_scale)
        norms.clip_(stats, {"a": 0.5})
    by_the_long_way(monkeypatch)
    norms = norms_of(other)
    expected = norms.measure(inv_scale)
    norms.clip_(expected, {"a": 0.5})
    assert torch.equal(stats.values.nan_to_num(7.0), expected.values.nan_to_num(7.0))
    assert torch.equal(stats.counts, expected.counts)
    if 8 not in missing:
        assert stats.to_dict()["b/d"]["tensor"] == "b/d[1]"
    for p, q in zip(direct, other, strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad.nan_to_num(7.0), q.grad.nan_to_num(7.0))


class Watched(torch.Tensor):
    """A class that wants to know what is done with it."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_class_of_its_own_is_asked() -> None:
    watched = torch.zeros(3).as_subclass(Watched).requires_grad_()
    watched.grad = torch.ones(3)
    norms = GroupGradNorm({"a": [watched]})
    Watched.seen.clear()
    norms.clip_(norms.measure(), 1.0)
    assert "__get__" in Watched.seen
    torch.testing.assert_close(watched.grad, torch.full((3,), 3**-0.5), rtol=1e-5, atol=0)


def test_a_mode_sees_the_ops() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    norms = norms_of(parameters())
    with Mode():
        norms.clip_(norms.measure(), 0.1)
    assert {"qwen_fused.group_grad_norm.default", "qwen_fused.group_grad_clip_.default"} <= set(Mode.seen)


def test_a_dispatch_mode_sees_the_ops_of_the_direct_way(monkeypatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(GroupGradNorm, "_gather", refused)
    norms = norms_of(parameters())
    with Mode():
        norms.clip_(norms.measure(), 0.1)
    assert {"qwen_fused.group_grad_norm.default", "qwen_fused.group_grad_clip_.default"} <= set(Mode.seen)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.ones(3).to_sparse(), "must be dense"),
        (torch.ones(3, dtype=torch.complex64), "must be float16, bfloat16, float32 or float64"),
        (torch.ones(3, device="meta"), "one device|must|meta"),
    ],
    ids=["sparse", "complex", "another device"],
)
def test_what_is_refused_is_refused_in_the_same_words(monkeypatch, gradient, message) -> None:
    p, q = (nn.Parameter(torch.zeros(3, dtype=gradient.dtype, device=gradient.device)) for _ in range(2))
    made = [*parameters(2), p, q]
    p.grad = gradient
    said = []
    for direct in (True, False):
        if not direct:
            by_the_long_way(monkeypatch)
        with pytest.raises((ValueError, RuntimeError), match=message) as error:
            GroupGradNorm({"a": made}).measure()
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("scale", ["half", [1.0], 1j, torch.ones(2), torch.ones(0), torch.tensor(1j)])
@pytest.mark.parametrize("there", [True, False])
def test_a_scale_must_be_a_number(scale, there: bool) -> None:
    given = parameters()
    if not there:
        for p in given:
            p.grad = None
    with pytest.raises(ValueError, match="inv_scale must"):
        norms_of(given).measure(scale)
