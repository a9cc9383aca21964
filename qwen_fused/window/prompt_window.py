"""The prompt window: several batches share one pass through Qwen, and the gradient is still exact.

Inside a window Qwen's weights stand still, so the prompt of a task is the same in every batch: z_k = encode(k; w).
The loss of the window is L = Σ_batches L_j(z), and by the chain rule, J_k being the Jacobian of z_k,

    dL/dw = Σ_j Σ_k J_k^T · dL_j/dz_k = Σ_k J_k^T · (Σ_j dL_j/dz_k)

The inner sum is collected on leaves, batch by batch; the outer one costs one backward pass through Qwen per key,
however many batches used it. Nothing is approximated: only the order of additions differs from the uncached sum.

"recompute" runs encode without a graph and once more in `flush`, under the same random state, so that dropout falls
alike; it needs the memory of one call's graph. "retain" keeps the graphs: one forward pass less, all of their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_fused.common.autograd_graph import graph_leaves
from qwen_fused.common.random_state import RandomState
from qwen_fused.window.checks import check_graph, check_keys, check_output, check_state, check_statistics, read_scale
from qwen_fused.window.drift import Drift
from qwen_fused.window.fused_steps import watch_fused_steps

MODES = ("recompute", "retain")


@dataclass
class Chunk:
    """One call of encode: new keys of one batch, in rows `start` to `start + len(output)` of the window."""

    start: int
    output: Tensor  # [n, ...]; with its graph in retain mode
    random: RandomState
    autocast: tuple[bool, torch.dtype]


class PromptWindow:
    """Hand out prompts for `size` batches, then send their summed gradient through `encode` once.

        window = PromptWindow(encode, size=10)
        for batch in batches:
            prompts = window.prompts(batch.keys)
            loss(prompts, batch).backward()
            other_optimizer.step()
            if window.full:
                window.flush()          # adds to the .grad of encode's parameters, as backward() would
                qwen_optimizer.step()
                qwen_optimizer.zero_grad()

    The sum is exact, by the chain rule: see the head of `qwen_fused.window.prompt_window`. "recompute" refuses an
    encode that gives other prompts the second time; what passes for the same, 3.1e-5 of a prompt's norm in float32 on
    the CPU and 2 % in bfloat16, stands at the head of `qwen_fused.window.drift`.

    Args:
        encode: takes n different keys as a list and returns [n, D] or [n, K, D], differentiably. Everything it trains
            must stand still inside a window; what steps at every batch belongs behind the window.
        size: batches per window, at least 1.
        mode: "recompute" runs encode again in `flush`, with the memory of one call's graph, so that encode must change
            nothing as it runs; "retain" keeps all graphs.

    Raises:
        ValueError: size or mode out of range.
    """

    def __init__(self, encode: Callable[[list[Any]], Tensor], size: int = 10, *, mode: str = "recompute") -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size must be a whole number of at least 1, got {size!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.encode, self.size, self.mode = encode, size, mode
        # what must stand still; found in encode's graph, unless somebody says so, as under FSDP
        self.parameters: list[Tensor] | None = None
        self._found = False
        watch_fused_steps()
        self.drift = Drift()
        self._begin()

    def _begin(self) -> None:
        self.batches = 0
        self.rows: dict[Hashable, int] = {}
        self.chunks: list[Chunk] = []
        self.leaves: list[tuple[Tensor, Tensor]] = []
        self.restored: Tensor | None = None
        self.versions: list[tuple[int, int]] = []
        # leaves of earlier windows hold an older token, and so know that they are out of date
        self.token = object()
        # whether a flush has begun to send: part of the gradient may be in the parameters' own
        self.half_sent = False

    @property
    def full(self) -> bool:
        """Whether the window has had its batches and waits for `flush`."""
        return self.batches >= self.size

    @property
    def reached(self) -> bool:
        """Whether a backward has reached any of the window's prompts, so that `flush` has something to send."""
        return self.restored is not None or any(leaf.grad is not None for leaf, _ in self.leaves)

    def prompts(self, keys: Sequence[Hashable]) -> Tensor:
        """The prompts of one batch, each computed at its first use in this window.

        Args:
            keys: B hashable keys, repeats allowed.

        Returns:
            [B, D] or [B, K, D] leaf that requires grad. What its `.grad` holds when `flush` comes is what Qwen gets:
            scale it or set it to None in between to rescale a batch or leave it out.

        Raises:
            ValueError: no keys, or no list of keys; or encode returns no tensor, another shape, carries no gradient, or
                would update its batch norms' statistics twice.
            RuntimeError: the window is full, parameters changed inside it, or a flush of it stopped half way.
        """
        self._check_whole()
        if self.full:
            raise RuntimeError(f"the window has had its {self.size} batches: call flush() before the next one")
        check_keys(keys)
        self._check_parameters()
        new = list(dict.fromkeys(key for key in keys if key not in self.rows))
        if new:
            self.chunks.append(self._encode(new, len(self.rows)))
            self.rows |= {key: len(self.rows) + index for index, key in enumerate(new)}
        table = torch.cat([chunk.output.detach() for chunk in self.chunks])
        rows = torch.tensor([self.rows[key] for key in keys], device="cpu").to(table.device, non_blocking=True)
        leaf = table[rows].requires_grad_()
        leaf.register_hook(self._guard())
        self.leaves.append((leaf, rows))
        self.batches += 1
        return leaf

    def flush(self, scale: float | Tensor = 1.0) -> int:
        """Send the window's gradient through encode into its parameters' `.grad`, and begin a new window.

        Args:
            scale: factor on the gradient, such as 1 / batches for a mean or a loss scale: a number, or a tensor of one
                element.

        Returns:
            The number of prompts that went through encode.

        Raises:
            ValueError: scale is neither.
            RuntimeError: nothing was handed out since the last flush, no backward reached it, parameters changed
                inside the window, encode gives prompts without a graph, as under inference_mode, or does not give the
                same prompts again (on CUDA: did not, at the last flush).
                A flush that stops half way, by an error of encode's or an interrupt, may have sent part of the
                gradient: a second one is refused, and `discard` is the way on. One that stopped before it sent
                anything can be called again.
        """
        self._check_whole()
        if self.batches == 0:
            raise RuntimeError("nothing to flush: no prompts were handed out since the last flush")
        if not self.reached:
            raise RuntimeError(
                "no gradient has reached the window's prompts: call backward() on a loss that uses them before flush()"
            )
        self._check_parameters()
        self.drift.raise_pending()
        gradient = self._gradient() * read_scale(scale)
        keys = list(self.rows)
        for chunk in self.chunks:
            rows = slice(chunk.start, chunk.start + len(chunk.output))
            output = chunk.output if chunk.output.requires_grad else self._recompute(chunk, keys[rows])
            check_graph(output)
            self.half_sent = True
            output.backward(gradient[rows].to(output.dtype))
            chunk.output = output.detach()
        self._begin()
        return len(keys)

    def discard(self) -> None:
        """Drop the window and the gradient collected in it; prompts already handed out are void.

        After a flush that stopped half way, set the gradients of encode's parameters to None too.
        """
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The window as it stands, in tensors and plain values: everything but the keys and the graphs.

        Returns:
            batches so far; for each call of encode, its outputs [n, ...], random state and autocast; and gradient, the
            sum so far [keys, ...], None before the first batch.

        Raises:
            RuntimeError: a flush of the window stopped half way.
        """
        self._check_whole()
        return {
            "batches": self.batches,
            "starts": [chunk.start for chunk in self.chunks],
            "outputs": [chunk.output.detach() for chunk in self.chunks],
            "gradient": self._gradient() if self.chunks else None,
            "rng_cpu": [chunk.random.cpu for chunk in self.chunks],
            "rng_cuda": [chunk.random.cuda for chunk in self.chunks],
            "autocast": [(on, str(dtype).removeprefix("torch.")) for on, dtype in (c.autocast for c in self.chunks)],
        }

    def load_state_dict(
        self, state: dict[str, Any], keys: Sequence[Hashable] = (), device: torch.device | str | None = None
    ) -> None:
        """Go on inside a window, with the weights and the global generators restored by the caller.

        Args:
            state: from `state_dict`.
            keys: the keys of the window's batches so far, one batch after the other; repeats are ignored.
            device: where encode works, if the state was loaded to another device.

        Raises:
            ValueError: the keys are not as many as the state's prompts, the window is smaller than the state, or the
                state is not whole.
        """
        unique = list(dict.fromkeys(keys))
        count = check_state(state, len(unique), self.size)
        self._begin()
        self.batches = state["batches"]
        self.rows = {key: index for index, key in enumerate(unique)}
        self.restored = state["gradient"] if device is None or not count else state["gradient"].to(device)
        for start, output, cpu, cuda, (on, dtype) in zip(
            state["starts"], state["outputs"], state["rng_cpu"], state["rng_cuda"], state["autocast"], strict=True
        ):
            # generator states live on the CPU, wherever the rest of a checkpoint is loaded to
            random = RandomState(cpu.cpu(), [s.cpu() for s in cuda])
            output = output if device is None else output.to(device)
            self.chunks.append(Chunk(start, output, random, (on, getattr(torch, dtype))))
        if self.parameters is not None and count:
            self.versions = self._versions()

    def _encode(self, keys: list[Hashable], start: int) -> Chunk:
        random = RandomState.now()
        # the first graph of all shows which parameters must stand still
        keep_graph = self.mode == "retain" or self.parameters is None
        with torch.set_grad_enabled(keep_graph):
            output = self._checked(self.encode(keys), len(keys))
        if not keep_graph:
            # torch 2.10 would hand weights that autocast cast here, without a graph, to the pass that needs one
            torch.clear_autocast_cache()
        # a later one without its graph, as in a finite difference, is run again when it comes to be flushed
        if self.parameters is None and not output.requires_grad:
            raise ValueError("encode must be differentiable, got a result that does not require grad")
        if self.parameters is None and self.mode == "recompute":
            check_statistics(output)
        # anew where there is a graph: layers may have been unfrozen or replaced since the last window. In recompute
        # mode what they change is seen by the prompts that come out otherwise
        again = self._found and self.mode == "retain" and not self.chunks and output.requires_grad
        if self.parameters is None or again:
            self._found = True
            leaves = graph_leaves(output)
            # a leaf made inside encode, as peft makes one for checkpointing, is no weight that must stand still
            self.parameters = [leaf for leaf in leaves if isinstance(leaf, torch.nn.Parameter)] or leaves
        if not self.versions:
            self.versions = self._versions()
        autocast = torch.is_autocast_enabled(on := output.device.type), torch.get_autocast_dtype(on)
        return Chunk(start, output if self.mode == "retain" else output.detach(), random, autocast)

    def _recompute(self, chunk: Chunk, keys: list[Hashable]) -> Tensor:
        enabled, dtype = chunk.autocast
        with (
            chunk.random.again(),
            torch.enable_grad(),
            torch.autocast(chunk.output.device.type, dtype=dtype, enabled=enabled),
        ):
            output = self._checked(self.encode(keys), len(keys))
        self.drift.compare(output, chunk.output, chunk.autocast)
        return output

    def _gradient(self) -> Tensor:
        """Sum over the window's batches of the gradients on their leaves [keys, ...], at least float32."""
        first = self.chunks[0].output
        if self.restored is None:
            shape = (sum(len(chunk.output) for chunk in self.chunks), *first.shape[1:])
            total = first.new_zeros(shape, dtype=torch.promote_types(first.dtype, torch.float32))
        else:
            added = len(self.rows) - len(self.restored)
            total = torch.cat([self.restored, self.restored.new_zeros(added, *first.shape[1:])])
        for leaf, rows in self.leaves:
            if leaf.grad is not None:
                # index_put sums repeated rows in a fixed order on every device; index_add does not
                total.index_put_((rows,), leaf.grad.to_dense().to(total.dtype), accumulate=True)
        return total

    def _checked(self, output: Any, n: int) -> Tensor:
        check_output(output, n, self.chunks[0].output.shape[1:] if self.chunks else None)
        return output

    def _versions(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self.parameters or ()]

    def _check_parameters(self) -> None:
        if self.versions and self._versions() != self.versions:
            raise RuntimeError(
                "parameters of encode changed inside the window: call flush() before their optimizer steps"
            )

    def _check_whole(self) -> None:
        if self.half_sent:
            raise RuntimeError(
                "a flush of this window stopped half way, and part of its gradient may have reached the parameters of "
                "encode: set their gradients to None and call discard(), then go on with a new window"
            )

    def _guard(self) -> Callable[[Tensor], None]:
        token = self.token

        def refuse_late(gradient: Tensor) -> None:
            if token is not self.token:
                raise RuntimeError(
                    "backward through a prompt whose window is over: take it from the window again after flush()"
                )

        return refuse_late
