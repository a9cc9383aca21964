"""Continuing a run: which checkpoint is taken, what may have changed since, and what is put aside.

The newest checkpoint that is whole is taken, and a damaged one is told. A run whose first checkpoint was never written
starts again at its first batch, in its folder. Settings that only say how long a run goes, where, and how it is watched
(`MAY_CHANGE`) may change. Any other setting, the tasks and the version of this package may not, since the continuation
would be another run: `--resume-changed` goes on with what is given now. Runs of the versions in `RESUMES_FROM` go on as
they are. Other sources of the same version and another torch are told in the log.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qwen_fused.arc.episodes import Task
from qwen_fused.common.files import remove_partial
from qwen_fused.config import TrainConfig
from qwen_fused.train.checkpoint import list_checkpoints, read_state
from qwen_fused.train.located import located

MAY_CHANGE = frozenset(
    {
        "max_batches", "max_minutes", "device", "cuda_graphs", "prove", "on_nonfinite", "log_every", "checkpoint_every",
        "keep_checkpoints", "eval_every", "max_eval_tasks", "start_tasks", "start_minutes", "ttt_seconds", "out",
        "resume", "resume_changed", "trackers", "shard_qwen",
    }
)  # fmt: skip
# versions whose runs this one continues: norms are nearer the truth since 0.3, so clipped gradients differ in last bits
RESUMES_FROM = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0")
SET_ASIDE = "set-aside"
STATE_KEYS = ("model", "optimizer", "scaler", "progress", "window", "monitor", "rng", "origin")


@dataclasses.dataclass
class Continuation:
    """A run to go on with."""

    folder: Path
    checkpoint: Path | None  # None: no checkpoint was written yet
    state: dict[str, Any] | None
    notes: list[str]  # for the log
    changes: list[str]  # what differs from the run as it was

    @property
    def step(self) -> int:
        """Batches done."""
        return self.state["progress"]["step"] if self.state else 0


def run_folder(path: Path) -> Path:
    """The run folder that a run folder, its checkpoints folder or one of its checkpoints stands for.

    Raises:
        ValueError: there is no run.
    """
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"resume must be a run folder or a checkpoint in one, with a config.yaml, got {path}")


def load_run_config(folder: Path) -> TrainConfig:
    """The configuration of a run folder; runs before 0.3 do not name their agent, which was the conv one.

    Raises:
        ValueError: as `TrainConfig.load`.
    """
    return TrainConfig.load(folder / "config.yaml", TrainConfig(agent="conv"))


def open_run(config: TrainConfig) -> Continuation:
    """Find and read what `config.resume` names, and compare the settings.

    Raises:
        ValueError: there is no such run, or no whole checkpoint, or settings changed and `resume_changed` is not set.
    """
    assert config.resume is not None
    folder = run_folder(config.resume)
    # runs before 0.4 kept paths as they were given
    saved = located(load_run_config(folder))
    checkpoint, state, notes = read_newest_state(config.resume)
    if state is not None and not set(STATE_KEYS) <= set(state):
        raise ValueError(f"resume must be a run's step-*.safetensors, got {checkpoint}, which holds weights only")
    changes = [
        f"{field.name} was {getattr(saved, field.name)}, is {getattr(config, field.name)}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in MAY_CHANGE and getattr(config, field.name) != getattr(saved, field.name)
    ]
    run = Continuation(folder, checkpoint, state, notes, changes)
    if not config.resume_changed:
        refuse_changes(run)
    return run


def refuse_changes(run: Continuation) -> None:
    """Raise a ValueError that names what differs from the run as it was."""
    if run.changes:
        raise ValueError(
            f"resume would not be the same run as {run.folder}: {'; '.join(run.changes)}. Give what it had, or pass "
            "--resume-changed to go on with what is given now"
        )


def read_newest_state(path: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """Read the checkpoint that a file or a run folder stands for: in a folder the newest that is whole.

    Returns:
        Its path and state, both None in a run folder that has no checkpoint yet; and a note for each damaged one.

    Raises:
        ValueError: there is no such file or folder, or what is there is damaged.
    """
    if path.is_file():
        return path, read_state(path), []
    found = [*list_checkpoints(path), *list_checkpoints(path / "checkpoints")]
    damaged = []
    for checkpoint in reversed(found):
        try:
            state = read_state(checkpoint)
        except ValueError as error:
            damaged.append(str(error))
            continue
        return checkpoint, state, [f"{sentence}; the one before it is taken" for sentence in damaged]
    if damaged:
        raise ValueError(f"{path} has no checkpoint that is whole: {'; '.join(damaged)}")
    if not (path / "config.yaml").is_file():
        raise ValueError(f"resume must be a run folder or a checkpoint, got {path}, which holds no step-*.safetensors")
    return None, None, [f"{path} has no checkpoint yet: starting at its first batch."]


def fingerprint(training: Iterable[Task], held_out: Iterable[Task]) -> dict[str, str]:
    """What a continuation should have in common with the run as it was, besides its settings."""
    from qwen_fused import __version__

    digest = hashlib.sha256()
    for part, tasks in (("training", training), ("held out", held_out)):
        for task in tasks:
            digest.update(f"\0{part}\0{task.id}\0{len(task.train)}\0{len(task.test)}".encode())
            for grid in (grid for pair in task.train + task.test for grid in (pair.input, pair.output)):
                digest.update(repr(None if grid is None else (grid.shape, grid.tobytes())).encode())
    code = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for source in sorted([*package.rglob("*.py"), *(package / "kernels").glob("*.py")]):
        code.update(source.read_bytes())
    return {"tasks": digest.hexdigest(), "version": __version__, "code": code.hexdigest(), "torch": torch.__version__}


def compare_fingerprint(run: Continuation, now: Mapping[str, str], *, allow: bool) -> None:
    """Compare with what wrote the checkpoint, which has it under the key "origin".

    Raises:
        ValueError: the tasks or the version are others and `allow` is not set.
    """
    was = run.state["origin"] if run.state else now
    if was["tasks"] != now["tasks"]:
        run.changes.append("the tasks, or their division into training and held-out ones, are others")
    if was["version"] not in (now["version"], *RESUMES_FROM):
        run.changes.append(f"qwen-fused was {was['version']}, is {now['version']}")
    elif was["version"] != now["version"]:
        run.notes.append(
            f"Begun by qwen-fused {was['version']}, which {now['version']} continues, but for last bits of clipped "
            "gradients."
        )
    elif was["code"] != now["code"]:
        run.notes.append(f"The code is not what wrote {run.checkpoint}: batches may come out otherwise than they did.")
    if was["torch"] != now["torch"]:
        run.notes.append(f"torch was {was['torch']}, is {now['torch']}: batches may differ in their last bits.")
    if not allow:
        refuse_changes(run)
    run.notes += [f"Changed: {change}." for change in run.changes]


def set_later_aside(run: Continuation) -> None:
    """Move checkpoints that come after the one taken, or are damaged, out of the way, and half-written files too."""
    checkpoints = run.folder / "checkpoints"
    for folder in (run.folder, checkpoints):
        remove_partial(folder)
    # else the newest would not be this run's any more, and be the last to be deleted
    found = list_checkpoints(checkpoints)
    stale = [p for p in found if _step(p) >= run.step and not (run.checkpoint and p.samefile(run.checkpoint))]
    for path in stale:
        (checkpoints / SET_ASIDE).mkdir(exist_ok=True)
        path.replace(checkpoints / SET_ASIDE / path.name)
    if stale:
        run.notes.append(f"Put aside in {checkpoints / SET_ASIDE}: {', '.join(path.name for path in stale)}.")


@contextmanager
def explain_mismatch(checkpoint: Path) -> Iterator[None]:
    """Say in one sentence that a checkpoint is of another model than its configuration builds."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split("\n")[:2]).replace("\t", "")
        raise ValueError(f"checkpoint {checkpoint} does not fit the configuration: {first}") from None


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
