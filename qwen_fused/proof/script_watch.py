"""See the first optimizer step of somebody else's script: what was sent back, what arrived, and what the step moved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qwen_fused.common.autograd_graph import graph_leaves, graph_nodes
from qwen_fused.proof.backtrace import Passed, watch_node
from qwen_fused.proof.kept_state import overridden
from qwen_fused.proof.labels import tensors_in
from qwen_fused.proof.moves import has_nonzero
from qwen_fused.proof.optimizers import rate_of, rate_to_come
from qwen_fused.proof.script_names import variables_of
from qwen_fused.proof.script_trace import ScriptTracer

# steps in which a gradient of zero may come alive, and a rate of 0 may rise: an adapter's other side, a warm-up
LOOKS = 3
# backward passes after the first step in which the other optimizers may take theirs
TURNS = 8


class Finished(BaseException):
    """Leaves the script when its first step has been seen; no `except Exception` holds it."""


class FirstStep:
    """What happens to the parameters of every optimizer, up to and with the first step.

    Gradients are taken when the optimizer comes to use them. With several optimizers the script goes on until each has
    stepped, for up to eight backward passes; with a gradient of zero, a parameter that the loss did not use, or a
    learning rate that a scheduler holds at 0, for up to three steps.

    Args:
        optimizers: every one that was made.
        stepped: those that stepped.
        delivered: id of a parameter -> whether backward ever gave it more than zeros.
        gradients: id -> gradient when the optimizer used it.
        later: id -> gradient of a later step, of those that were zero, or that the first step's losses did not use.
        moved: id -> number of elements that the step changed.
        before: id -> value before the first step.
        rates: id -> learning rate, None where the optimizer finds its own; and where it is 0, the rate to come.
        reached: id -> parameter, of all that any loss was connected to.
        passed: autograd node -> what came into its backward and what went out of it, in words.
        failed: what the last backward pass raised, which leaves nothing to step with.
        hopeless: whether nothing sent back so far was connected to anything.
    """

    def __init__(self) -> None:
        self.tracer = ScriptTracer()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.stepped: list[torch.optim.Optimizer] = []
        self.delivered: dict[int, bool] = {}
        self.gradients: dict[int, Tensor] = {}
        self.later: dict[int, Tensor] = {}
        self.moved: dict[int, int] = {}
        self.before: dict[int, Tensor] = {}
        self.rates: dict[int, tuple[float | None, float]] = {}
        self.reached: dict[int, nn.Parameter] = {}
        self.passed: Passed = {}
        self.values = self.cuts = self.alive = 0  # labels of all the losses together
        self.losses = 0
        self.failed: RuntimeError | None = None
        self.hopeless = True
        self.loss: float | None = None
        self.variables: dict[str, Any] = {}
        self.looks = 0
        self._hooked: set[int] = set()
        self._inside: torch.optim.Optimizer | None = None
        self._sending = self._done = False
        self._turns = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch whatever runs inside."""
        add, send = torch.optim.Optimizer.add_param_group, torch.autograd.backward

        def adopt(optimizer: torch.optim.Optimizer, group: Any) -> None:
            add(optimizer, group)
            self._adopt(optimizer)

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._backward(send, tensors, args, kwargs)

        with ExitStack() as stack:
            stack.enter_context(overridden(torch.optim.Optimizer, "add_param_group", adopt))
            stack.enter_context(overridden(torch.autograd, "backward", backward))
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            stack.enter_context(self.tracer.installed())
            yield

    def trainable(self, optimizers: list[torch.optim.Optimizer]) -> dict[int, Tensor]:
        """id -> parameter, of those that the optimizers hold and that ask for a gradient."""
        every = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
        return {id(p): p for p in every if p.requires_grad}

    @property
    def waiting(self) -> set[int]:
        """Parameters of which a later step may say more."""
        dead = {key for key, grad in self.gradients.items() if not has_nonzero(grad)}
        # a layer that is dropped at random, an expert that nobody asked
        unused = {key for key in self.moved if key not in self.gradients and not self.values & self._bit(key)}
        return (dead | unused) - self.later.keys() | {key for key in self.held_back if not self.moved.get(key)}

    @property
    def pending(self) -> list[torch.optim.Optimizer]:
        """Optimizers that have something to step and have not."""
        left = [o for o in self.optimizers if not any(o is other for other in self.stepped)]
        return [optimizer for optimizer in left if self.trainable([optimizer])]

    @property
    def held_back(self) -> set[int]:
        """Parameters whose learning rate a warm-up held at 0 in the first step."""
        return {key for key, (rate, to_come) in self.rates.items() if rate == 0 and to_come > 0}

    def _bit(self, key: int) -> int:
        return self.tracer.labels.bits.get(key, 0)

    def _adopt(self, optimizer: torch.optim.Optimizer) -> None:
        if not any(optimizer is known for known in self.optimizers):
            self.optimizers.append(optimizer)
        for parameter in self.trainable([optimizer]).values():
            self.tracer.labels.add(parameter)
        self.tracer.active = not self.looks and not self._sending

    def _backward(self, send: Callable[..., None], tensors: Any, args: tuple, kwargs: dict) -> None:
        """Run one backward pass of the script, with an eye on what it delivers."""
        if self.stepped and not self._sending:
            self._turns += 1
            if self._turns > TURNS:
                self._conclude()
        if not self.tracer.active:
            send(tensors, *args, **kwargs)
            return
        self.variables = self.variables or variables_of(sys._getframe(1))
        self._note_losses(list(tensors_in(tensors)))
        self.tracer.active, self._sending = False, True
        try:
            send(tensors, *args, **kwargs)
        except RuntimeError as error:
            self.failed = error
            raise
        finally:
            self.tracer.active, self._sending = True, False
        # optimizers may step in the midst of it
        if self.stepped and not self.pending:
            self._conclude()

    def _note_losses(self, losses: list[Tensor]) -> None:
        labels = self.tracer.labels
        self.losses += 1
        self.tracer.log.look_for_unseen(losses)
        self.tracer.log.mark_continued(losses)
        for loss in losses:
            self.values |= labels.values(loss)
            self.cuts |= labels.cuts(loss)
            self.alive |= labels.alive(loss)
            self.hopeless = self.hopeless and not loss.requires_grad
            self.loss = float(loss.detach()) if loss.numel() == 1 else self.loss
            self.reached |= {id(leaf): leaf for leaf in graph_leaves(loss) if isinstance(leaf, nn.Parameter)}
            for node in graph_nodes(loss):
                if node not in self.passed:
                    self.passed[node] = [], []
                    watch_node(self.passed, node)
        for key, parameter in self.trainable(self.optimizers).items():
            if key not in self._hooked and parameter.is_leaf:
                self._hooked.add(key)
                parameter.register_post_accumulate_grad_hook(self._note_delivery)

    def _note_delivery(self, parameter: Tensor) -> None:
        if id(parameter) not in self.moved and parameter.grad is not None:
            some = self.delivered.get(id(parameter), False)
            self.delivered[id(parameter)] = some or has_nonzero(parameter.grad.detach().to_dense())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._done:
            # somebody held on to `Finished`
            raise Finished
        if self._inside is not None:
            return
        self._inside = optimizer
        if any(optimizer is known for known in self.stepped):
            return
        held = self.trainable([optimizer])
        # what is looked at here is no use that the script makes of it
        self.tracer.active = False
        for group in optimizer.param_groups:
            rate = rate_of(group), rate_to_come(optimizer, group)
            self.rates |= {id(p): rate for p in group["params"]}
        for key, parameter in held.items():
            self.tracer.labels.add(parameter)
            self.before[key] = parameter.detach().clone()
        if _closure(args, kwargs):
            self.tracer.active = not self._sending
        else:
            self._take_gradients(held)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer is not self._inside:
            return
        self._inside = None
        self.tracer.active = False
        held = self.trainable([optimizer])
        if any(optimizer is known for known in self.stepped):
            for key in self.waiting & held.keys():
                self._look_again(key, held[key])
            self.looks += bool(self.looks)
        else:
            if _closure(args, kwargs):
                self._take_gradients(held)
            self.stepped.append(optimizer)
            for key, parameter in held.items():
                self.moved[key] = self._count_moved(key, parameter)
            self.tracer.closed |= held.keys()
        self.tracer.active = bool(self.pending) and not self.looks and not self._sending
        if not self._sending and not self.pending:
            self._conclude()

    def _take_gradients(self, held: dict[int, Tensor]) -> None:
        # what no optimizer holds is told from its gradient too
        for key, parameter in (held | self.reached).items():
            if parameter.grad is not None and key not in self.gradients:
                self.gradients[key] = parameter.grad.detach().to_dense().clone()

    def _look_again(self, key: int, parameter: Tensor) -> None:
        if parameter.grad is not None and has_nonzero(parameter.grad.detach().to_dense()):
            self.later[key] = parameter.grad.detach().to_dense().clone()
        self.moved[key] = self._count_moved(key, parameter)

    def _count_moved(self, key: int, parameter: Tensor) -> int:
        return int((parameter.detach() != self.before[key]).count_nonzero()) if key in self.before else 0

    def _conclude(self) -> None:
        """Leave the script, unless a later step may say more."""
        if self.waiting and self.looks < LOOKS * len(self.stepped):
            self.looks = max(self.looks, 1)
            self.tracer.active = False
            return
        self._done = True
        raise Finished


def _closure(args: tuple, kwargs: dict) -> bool:
    return any(callable(value) for value in (*args[1:], *kwargs.values()))
