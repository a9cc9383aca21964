"""Follow a gradient back through the autograd graph and name the operation at which it ends, vanishes or breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.autograd_graph import graph_nodes
from qwen_fused.proof import frames, kinds, modes
from qwen_fused.proof.frames import Site
from qwen_fused.proof.labels import tensors_in
from qwen_fused.proof.subject import Subject

FINE, NONE, ZERO, NONFINITE = "fine", "none", "zero", "non-finite"
# autograd node -> what came into its backward and what went out of it, in those words
Passed = dict[Any, tuple[list[str], list[str]]]


@dataclass(frozen=True)
class Break:
    """An operation whose backward took a fine gradient and passed on none, zeros, or NaN and Inf.

    Args:
        status: what it passed on: "none", "zero" or "non-finite".
        operation: the operation's name, a custom Function's own where it is one.
        is_custom: whether somebody other than torch wrote its backward.
        site: where the operation was called in the forward pass.
        parameters: names of the parameters on that way.
    """

    status: str
    operation: str
    is_custom: bool
    site: Site
    parameters: frozenset[str]


def follow_backward(
    loss_fn: Callable[[], Tensor], parameters: Mapping[str, Tensor], backward: Callable[[Tensor], Any]
) -> list[Break]:
    """Run one backward pass and list the breaks, those nearest to the loss first.

    Gradients are accumulated into the parameters as usual. What a checkpointed segment recomputes is not looked into.
    """
    passed: Passed = {}
    with modes.uncompiled(), torch.autograd.set_detect_anomaly(True, check_nan=False):
        loss = frames.boundary(loss_fn)
        nodes = list(graph_nodes(loss))
        for node in nodes:
            watch_node(passed, node)
        # a graph that an earlier call freed raises here: what was passed on until then is what there is
        with suppress(RuntimeError):
            backward(loss)
    return breaks_among(
        passed, nodes, parameters, lambda node: frames.of_traceback(node.metadata.get("traceback_", ()))
    )


def watch_node(passed: Passed, node: Any) -> None:
    """Keep what an autograd node's backward is given and what it passes on."""

    def hook(grad_inputs: Any, grad_outputs: Any) -> None:
        passed[node] = [_status(g) for g in grad_outputs], [_status(g) for g in grad_inputs]

    node.register_hook(hook)


def breaks_among(
    passed: Passed, nodes: list[Any], parameters: Mapping[str, Tensor], site_of: Callable[[Any], Site]
) -> list[Break]:
    """The breaks of a backward pass that has been run, in the order of `passed`.

    Args:
        passed: what `watch_node` kept.
        nodes: of the graph.
        parameters: name -> parameter.
        site_of: where a node's operation was called.
    """
    reached = _reached(nodes, parameters)
    found = []
    for node, (came, went) in passed.items():
        for (child, _), status in zip(node.next_functions, went, strict=False):
            names = reached.get(child, frozenset())
            if names and status != FINE and _was_fine(status, came):
                is_custom = hasattr(node, "_forward_cls")
                operation = node._forward_cls.__name__ if is_custom else node.name().removesuffix("0")
                found.append(Break(status, operation, is_custom, site_of(node), names))
    return found


def breaks_of(
    subject: Subject, names: Iterable[str], status: str
) -> tuple[list[tuple[Break, tuple[str, ...]]], tuple[str, ...]]:
    """The breaks of one status, each with those of the names that it is the first to stop, and the names left over."""
    found = subject.watched_call(follow_backward, subject.trainable, subject.backward)
    subject.snapshot.clear_gradients()
    broken, left = [], tuple(names)
    for brk in found:
        hit = tuple(name for name in left if name in brk.parameters)
        if brk.status == status and hit:
            broken.append((brk, hit))
            left = tuple(name for name in left if name not in hit)
    return broken, left


def first_nonfinite(loss_fn: Callable[[], Any]) -> tuple[str, Site] | None:
    """The first operation of the forward pass whose result is NaN or Inf though its inputs are finite, and where."""
    found: list[tuple[str, Site]] = []

    def handler(func: Any, args: tuple, kwargs: dict) -> Any:
        before = [] if found else list(tensors_in((args, kwargs)))
        whole = all(_status(tensor) != NONFINITE for tensor in before)
        out = func(*args, **kwargs)
        # a mask of -inf is nobody's accident: only what carries a gradient counts, or a NaN
        suspects = [t for t in tensors_in(out) if t.is_floating_point() and (t.requires_grad or t.isnan().any())]
        if before and whole and not found and any(_status(tensor) == NONFINITE for tensor in suspects):
            name = kinds.name_of(func)
            if name not in ("masked_fill", "masked_fill_", "where"):
                found.append((kinds.describe(func, name, ""), frames.locate()))
        return out

    with modes.uncompiled(), modes.FunctionMode(handler):
        frames.boundary(loss_fn)
    return found[0] if found else None


def _status(tensor: Tensor | None) -> str:
    if tensor is None:
        return NONE
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return FINE
    values = tensor.detach()
    values = values.coalesce().values() if values.is_sparse else values
    if not values.isfinite().all():
        return NONFINITE
    return FINE if values.any() else ZERO


def _was_fine(status: str, came: list[str]) -> bool:
    if status == NONFINITE:
        return NONFINITE not in came
    return FINE in came


def _reached(nodes: list[Any], parameters: Mapping[str, Tensor]) -> dict[Any, frozenset[str]]:
    """Names of the parameters that each node leads to."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    parents: dict[Any, list[Any]] = {}
    for node in nodes:
        for child, _ in node.next_functions:
            parents.setdefault(child, []).append(node)
    reached: dict[Any, set[str]] = {}
    for node in nodes:
        name = names.get(id(getattr(node, "variable", None))) if type(node).__name__ == "AccumulateGrad" else None
        if name is None:
            continue
        stack = [node]
        while stack:
            here = stack.pop()
            if name not in reached.setdefault(here, set()):
                reached[here].add(name)
                stack += parents.get(here, ())
    return {node: frozenset(found) for node, found in reached.items()}
