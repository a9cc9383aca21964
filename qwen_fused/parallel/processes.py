"""Several processes train as one: `torchrun --nproc-per-node 2 -m qwen_fused train ...`

Each batch of B episodes is cut into one part per process, side by side. A process's loss is the mean over its own part
times the part's weight, its share of B, so the sum of all gradients is that of the one mean over B. They are summed
once per batch, after the prompt window was flushed and before the norms: the window's passes through Qwen need no
synchronisation, and norms, clipping and the optimizer see what one process would. Noise is drawn for the whole batch
and cut likewise, and the anchor hears of every episode. So weights, generators and loss curve are those of one process,
up to the order of additions, and a checkpoint of either goes on as the other.

Every process reads the same files and evaluates the same tasks, in step, and what all but the first one write is thrown
away. Evaluating in one process would save nothing: the others could only wait, at worst into a time limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor

# of gradients that travel together
BUCKET_BYTES = 2**26


@dataclass(frozen=True)
class Part:
    """One process's part of a batch."""

    rows: slice  # of the batch's episodes; the first one stands in where there are fewer episodes than processes
    weight: float  # of the batch's loss; 0 for a stand-in
    batch_size: int  # episodes of the whole batch


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; alone by default, and then every method gives back what it was given."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, count: int, rank: int | None = None) -> Part:
        """The part of `count` episodes that this process has, or another one; no two parts differ by more than one."""
        rank = self.rank if rank is None else rank
        each, more = divmod(count, self.world_size)
        begin = rank * each + min(rank, more)
        end = begin + each + (rank < more)
        if begin == end:
            # every process takes part in every sum; a weight of 0 keeps the stand-in out of it
            return Part(slice(0, 1), 0.0, count)
        return Part(slice(begin, end), (end - begin) / count, count)

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over all processes of a tensor of one shape, the same bits everywhere."""
        if self.world_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def all_reduce_norm(self, norm: Tensor) -> Tensor:
        """The norm of all processes' parts together."""
        return norm if self.world_size == 1 else self.all_reduce(norm.square()).sqrt()

    def all_reduce_and(self, flag: Tensor) -> Tensor:
        """Whether a flag is set in every process, on the device."""
        return flag if self.world_size == 1 else self.all_reduce((~flag).float()) == 0

    def all_gather(self, values: Tensor, part: Part) -> Tensor:
        """[B, ...] of the whole batch, from each process's [b, ...]."""
        if self.world_size == 1:
            return values
        every = values.new_zeros((part.batch_size, *values.shape[1:]), dtype=torch.float32)
        if part.weight:
            every[part.rows] = values.float()
        return self.all_reduce(every).to(values.dtype)

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """For each number the largest that any process has; waits for all of them, and for no device."""
        if self.world_size == 1:
            return list(numbers)
        # a tensor of the CPU: it travels beside the device's work
        largest = torch.tensor(numbers, dtype=torch.int32)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    @contextmanager
    def silenced(self) -> Iterator[Path | None]:
        """For all but the first process: a folder for what they write, which is thrown away, and no console."""
        if self.is_main:
            yield None
            return
        with TemporaryDirectory() as folder, open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            yield Path(folder)

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients over all processes, in place; those of sharded parameters are already summed."""
        if self.world_size == 1:
            return
        plain = [p.grad for p in parameters if p.grad is not None and not hasattr(p.grad, "placements")]
        for bucket in buckets(plain):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            dist.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])

    def device(self, name: str) -> str:
        """`--device` for this process: each has a GPU of its own."""
        if self.world_size == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split into lists of one type whose tensors take at most BUCKET_BYTES together, or are single."""
    for dtype in dict.fromkeys(grad.dtype for grad in gradients):
        bucket: list[Tensor] = []
        for grad in (grad for grad in gradients if grad.dtype == dtype):
            if bucket and sum(g.nbytes for g in bucket) + grad.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(grad)
        yield bucket


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The processes that torchrun started, connected while the block lasts; without torchrun, this one alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
