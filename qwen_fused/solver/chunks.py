"""Solving many tasks side by side: which go together, and what happens where that fails.

Tasks of a chunk share a canvas and the device's memory. A chunk that fails is halved and tried again, down to one task:
too little memory costs time, and a broken task costs itself alone.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from qwen_fused.arc.tasks import Task
from qwen_fused.planner.agent import GridAgent
from qwen_fused.solver.adapt_many import adapt_many
from qwen_fused.solver.examples import canvas_of
from qwen_fused.solver.question import Question, ReadPlanner
from qwen_fused.solver.results import TaskResult, digest, fallback
from qwen_fused.solver.settings import SolveSettings
from qwen_fused.solver.task_planner import encode_task
from qwen_fused.solver.task_solver import TaskAnswer
from qwen_fused.solver.vote_many import own_accuracies, vote_many

# what a chunk more costs beside the cells of its canvases: a step's launches take as long as so many cells
CHUNK_CELLS = 2000
# share of the free memory that is planned with
MEMORY_SHARE = 0.75
# of a task whatever its size: weights, gradients, optimizer
TASK_BYTES = 16e6


class Stopped(Exception):
    """Whoever asked wants no more."""


def run_chunks(
    agent: GridAgent,
    questions: Iterator[Question | TaskResult],
    settings: SolveSettings,
    *,
    deadline: float | None = None,
    should_stop: Callable[[], object] = lambda: None,
    on_step: Callable[[Sequence[Task], int], object] = lambda tasks, step: None,
    chunk_bytes: float | None = None,
) -> Iterator[TaskResult]:
    """Solve tasks side by side on the device of the agent's parameters; yields rows, chunk by chunk.

    Args:
        agent: what every task starts from; it stays as it is.
        questions: each a task to solve, or its row, which is handed on.
        settings: what is done for a task; its `task_seconds` is for all tasks of a chunk.
        deadline: on `time.monotonic()`'s clock; no chunk begins after it, and the one begun ends its training then.
        should_stop: asked at every step; something true leaves what is not done.
        on_step: called after every step with the tasks of its chunk and its number, from 1.
        chunk_bytes: memory of a chunk; by default what is free on the device, without limit on a CPU.
    """
    asked = []
    for question in questions:
        if should_stop():
            return
        if isinstance(question, TaskResult):
            yield question
        else:
            asked.append(question)
    device = agent.copy_scale.device
    budget = free_bytes(device) if chunk_bytes is None else chunk_bytes
    pending = make_chunks(asked, lambda question: cost_canvas(question.shown), cell_bytes(agent, settings), budget)

    def stepped(tasks: Sequence[Task], step: int) -> None:
        on_step(tasks, step)
        if should_stop():
            raise Stopped

    while pending:
        if deadline is not None and time.monotonic() >= deadline:
            return
        # a chunk leaves cycles behind, and in them its memory
        free(device)
        chunk = pending.pop(0)
        try:
            rows, failed = solve_chunk(agent, chunk, settings, deadline, stepped), ""
        except Stopped:
            return
        except Exception as error:
            rows, failed = [], f"{type(error).__name__}: {error}".split("\n")[0]
        if failed:
            # outside of the except clause, as its traceback holds the tensors
            if len(chunk) == 1:
                rows = [fallback(chunk[0].task, failed)]
            else:
                middle = len(chunk) // 2
                pending = [chunk[:middle], chunk[middle:], *pending]
        yield from rows


def solve_chunk(
    agent: GridAgent,
    chunk: Sequence[Question],
    settings: SolveSettings,
    deadline: float | None,
    on_step: Callable[[Sequence[Task], int], object],
) -> list[TaskResult]:
    """Adapt to the tasks of a chunk, and vote for each."""
    started = time.monotonic()
    asked, tasks = [question.task for question in chunk], [question.shown for question in chunk]
    encoded = [encode_task(ReadPlanner(agent, q), q.task, settings.symmetries) for q in chunk]  # type: ignore[arg-type]
    adapted = adapt_many(agent, encoded, tasks, settings, deadline=deadline, on_step=lambda step: on_step(asked, step))
    ended = deadline is not None and time.monotonic() >= deadline and adapted.steps < settings.steps
    own = own_accuracies(adapted.stacked, tasks, settings.batch)
    votes = vote_many(adapted.stacked, tasks, settings, settings.batch)
    seconds = (time.monotonic() - started) / len(tasks)
    return [
        TaskResult(
            TaskAnswer(
                task.id, tuple(v.attempts for v in found), tuple(v.confidence for v in found), seconds, adapted.steps,
                losses, cells, grids,
            ),
            digest(question.task),
            cut=ended,
        )
        for question, task, found, losses, (cells, grids) in zip(chunk, tasks, votes, adapted.losses, own, strict=True)
    ]  # fmt: skip


def make_chunks(
    items: Sequence[Question], canvas: Callable[[Question], tuple[int, int]], bytes_a_cell: float, budget: float
) -> list[list[Question]]:
    """Tasks put together so that little of their canvases is empty and little time goes into launches.

    Args:
        items: what to put together.
        canvas: of each of them.
        bytes_a_cell: memory of a cell of a task's canvas while it is trained on.
        budget: most bytes of a chunk; a task that needs more is a chunk by itself.

    Returns:
        Chunks, those of small canvases first: the cheapest cut of the sorted tasks, where a chunk costs its cells and
        CHUNK_CELLS.
    """
    ordered = sorted(items, key=lambda item: (math.prod(canvas(item)), item.task.id))
    sides = [canvas(item) for item in ordered]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(ordered) + 1):
        options = []
        height = width = 0
        for begin in range(end - 1, -1, -1):
            height, width = max(height, sides[begin][0]), max(width, sides[begin][1])
            count = end - begin
            if count > 1 and count * (height * width * bytes_a_cell + TASK_BYTES) > budget:
                break
            options.append((best[begin][0] + count * height * width + CHUNK_CELLS, begin))
        best.append(min(options))
    chunks: list[list[Question]] = []
    end = len(ordered)
    while end:
        begin = best[end][1]
        chunks.insert(0, ordered[begin:end])
        end = begin
    return chunks


def cost_canvas(task: Task) -> tuple[int, int]:
    """The canvas that a task is trained on: of its demonstrations, upright and, where they turn, turned."""
    height, width = canvas_of([grid.shape for p in task.train for grid in (p.input, p.output)])  # type: ignore[union-attr]
    return (height, width) if height == width else (max(height, width),) * 2


def cell_bytes(agent: GridAgent, settings: SolveSettings) -> float:
    """Memory of a cell while it is trained on: of every step some 25 states are kept, and what it is made of."""
    element = agent.copy_scale.element_size()
    return settings.batch * (element * agent.core.norm.numel() * (25 * agent.steps + 40) + 4000)


def free_bytes(device: torch.device) -> float:
    """Memory that may be planned with."""
    if device.type != "cuda":
        return math.inf
    free(device)
    return MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]


def free(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
