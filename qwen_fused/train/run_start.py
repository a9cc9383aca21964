"""A run's second result: a start for training on tasks, in start.safetensors beside its checkpoints.

It is learned after the last batch, when Qwen reads as it will read from then on, and goes on where it was stopped.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

from qwen_fused.planner.agent import GridAgent
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.report.run_log import RunLog
from qwen_fused.solver.start import Start, learn_start, with_agent
from qwen_fused.train.checkpoint import read_state, write_state
from qwen_fused.train.resume import explain_mismatch
from qwen_fused.train.signals import Interrupted, catch_signals
from qwen_fused.train.trainer import Trainer

START = "start.safetensors"
SAVE_EVERY = 30.0  # seconds


def learn_run_start(trainer: Trainer, log: RunLog, max_seconds: float | None = None) -> GridAgent | None:
    """Learn the run's start, or go on with it; None where a run has none.

    Args:
        trainer: after its last batch; its weights stay as they are.
        log: gets a line.
        max_seconds: end it after about so many.

    Raises:
        Interrupted: a signal asked the run to end; what is learned is written.
        OSError: it could not be written.
    """
    config, path = trainer.config, trainer.folder / START
    agent = trainer.model.agent
    if not (config.start_tasks and config.ttt_seconds and trainer.training) or trainer.sharded:
        return None
    if not isinstance(agent, GridAgent):
        return None
    start = read_start(path, agent) if path.is_file() else None
    if start is None:
        start = Start(copy.deepcopy(agent))
    if start.done:
        return start.agent
    saved = time.monotonic()

    def on_task(done: int) -> None:
        nonlocal saved
        advance(done)
        if time.monotonic() - saved > SAVE_EVERY:
            write_state(path, start.state_dict())
            saved = time.monotonic()

    with catch_signals() as signalled, log.progress(config.start_tasks, start.tasks, "learning a start") as advance:
        try:
            learn_start(
                trainer.model, trainer.training, start, most=config.start_tasks, seconds=max_seconds, seed=config.seed,
                should_stop=signalled, on_task=on_task,
            )  # fmt: skip
        except RuntimeError as error:
            # a run is whole without it, and has what was learned until then
            log.say(f"No more of a start is learned: {error}")
            if not start.tasks:
                return None
        write_state(path, start.state_dict())
        if number := signalled():
            log.say(f"Interrupted after {start.tasks} tasks of the start; to go on: --resume {trainer.folder}")
            raise Interrupted(number)
    log.say(f"A start from {start.tasks} trainings on training tasks: {start.describe()}")
    return start.agent


def read_start(path: Path, like: GridAgent) -> Start:
    """The start in a file.

    Args:
        path: what `learn_run_start` wrote.
        like: an agent of the same shape, on the device where it is to be.

    Raises:
        ValueError: the file is damaged, or of another shape.
    """
    state = read_state(path)
    start = Start(copy.deepcopy(like))
    with explain_mismatch(path):
        start.load_state_dict(state)
    return start


def with_start(planner: QwenPlanner, run: Path) -> tuple[QwenPlanner, int]:
    """A run's planner with the run's start for an agent, and the tasks it was learned from; 0: the run has none."""
    path = run / START
    if not path.is_file() or not isinstance(planner.agent, GridAgent):
        return planner, 0
    start = read_start(path, planner.agent)
    return with_agent(planner, start.agent), start.tasks
