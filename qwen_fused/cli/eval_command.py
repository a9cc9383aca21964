"""`qwen-fused eval`: a run's weights on any tasks; a submission that names every task, and scores as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_fused.arc.reader import load_tasks
from qwen_fused.arc.scoring import Evaluation, copied, write_submission
from qwen_fused.arc.split import divide, names, shared_tasks
from qwen_fused.arc.tasks import Task, TaskCollection
from qwen_fused.cli.flags import parse
from qwen_fused.common.files import safe_name, write_atomic
from qwen_fused.config import TrainConfig, error_prefix, require

OWN_SPLITS = ("validation", "training", "evaluation")
# sentences about what was left out
TOLD = 10


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a run's weights on ARC tasks and write a submission."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    dataset: str | None = None
    """Other tasks than the run's own: arc1, arc2, a folder of tasks, a task file, a Kaggle challenges file."""
    split: str | None = None
    """The run's held-out tasks (validation, the default), its training tasks' test pairs (training), or its dataset's
    evaluation set (evaluation); of --dataset any part that is there, by default evaluation or the only one."""
    ttt_steps: int = 0
    """Steps of training on each task before it is answered, as `qwen-fused solve` does; 0: as the weights are."""
    weights: Literal["last", "best"] = "last"
    """The newest checkpoint, or the best one on the held-out tasks."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def run_eval(arguments: Sequence[str]) -> int:
    """`qwen-fused eval`."""
    config = parse(EvalConfig, "eval", arguments)
    require(config.ttt_steps >= 0, "ttt_steps", "a number of at least 0", config.ttt_steps)
    from qwen_fused.common.device import resolve_device
    from qwen_fused.train.run_start import with_start
    from qwen_fused.train.saved import load_model

    model = load_model(config.run, config.weights, resolve_device(config.device))
    collection, name = tasks_of_run(config.run, model.config, config.dataset, config.split)
    tell_left_out(collection)
    tell_cut(model, collection.tasks)
    if config.ttt_steps:
        model, _ = with_start(model, config.run)
    answer = adapted_evaluation if config.ttt_steps else plain_evaluation
    answered = answer(model, collection.tasks, config.ttt_steps)
    left_out = tuple(record for task in collection.unusable for record in copied(task))
    result = Evaluation(answered.records + left_out)
    tasks = (*collection.tasks, *collection.unusable)
    submission, score = (config.run / f"{what}-{safe_name(name)}.json" for what in ("submission", "score"))
    write_submission(submission, tasks, result.predictions)
    unanswered = [task.id for task in collection.unusable]
    content = {"split": name, **result.summary(), "unanswered": unanswered, "by_task": result.by_task()}
    write_atomic(score, json.dumps(content, indent=1) + "\n")
    print(f"{name}: {result.describe()}\nSubmission: {submission}\nScore: {score}")
    return 0


def tell_left_out(collection: TaskCollection) -> None:
    """Say what could not be used, and what the submission has in its place."""
    for sentence in collection.skipped[:TOLD]:
        print(f"Left out: {sentence}")
    if len(collection.skipped) > TOLD:
        print(f"Left out: {len(collection.skipped) - TOLD} more.")
    if collection.unusable:
        ids = names([task.id for task in collection.unusable])
        print(f"{len(collection.unusable)} tasks can't be asked: their queries stand for their answers: {ids}")


def tell_cut(model: Any, tasks: Sequence[Task]) -> None:
    """Say how many prompts have no room for all of their demonstrations."""
    from qwen_fused.qwen.prompt_text import describe_cut

    text = model.prompt.prompt_text
    told = describe_cut({"": text.truncation(task.train for task in tasks)}, text.max_tokens)
    if told:
        print(told.replace("a larger --max-prompt-tokens", "a run with a larger --max-prompt-tokens"))


def tasks_of_run(run: Path, trained: TrainConfig, dataset: str | None, split: str | None) -> tuple[TaskCollection, str]:
    """The tasks that `qwen-fused eval` is about, and a name for them.

    Args:
        run, trained: the run, and its configuration.
        dataset: other tasks than the run's.
        split: of these or of the run's own; None is its held-out tasks, or of `dataset` what `load_tasks` takes then.

    Raises:
        ValueError: there are no such tasks.
    """
    with error_prefix(f"run {run}"):
        known = load_tasks(trained.dataset).tasks
    if dataset is not None:
        collection = load_tasks(dataset, split, min_pairs=1)
        name = "-".join(filter(None, (Path(dataset).stem, split)))
    else:
        name = split or "validation"
        if name not in OWN_SPLITS:
            raise ValueError(f"split must be one of {', '.join(OWN_SPLITS)} without --dataset, got {name!r}")
        with error_prefix(f"run {run}"):
            if name != "evaluation":
                division = divide(known, trained.val_fraction, trained.split_seed, trained.held_out)
                chosen = division.training if name == "training" else division.held_out
                if not chosen:
                    raise ValueError("it holds no task out; pass --split training or evaluation, or --dataset")
                return TaskCollection(chosen), name
            collection = load_tasks(trained.dataset, "evaluation", min_pairs=1)
    shared = shared_tasks(known, collection.tasks)
    if shared:
        print(
            f"{len(shared)} of these {len(collection.tasks)} tasks share a pair with a training task: {names(shared)}"
        )
    return collection, name


def plain_evaluation(model: Any, tasks: Sequence[Task], steps: int = 0) -> Evaluation:
    """Answers as the weights are, with a bar where there is a terminal."""
    from rich.console import Console

    from qwen_fused.arc.episodes import test_episodes
    from qwen_fused.report.run_log import progress_bar
    from qwen_fused.solver.evaluate import evaluate

    episodes = test_episodes(tasks)
    with progress_bar(Console(), len(episodes), 0, "test inputs") as advance:
        return evaluate(model, episodes, batch_size=model.config.batch_size, on_done=advance)


def adapted_evaluation(model: Any, tasks: Sequence[Task], steps: int) -> Evaluation:
    """Answers after so many steps of training on each task; a line for each is printed."""
    from qwen_fused.report.solve_log import SolveLog
    from qwen_fused.solver.settings import SolveSettings
    from qwen_fused.solver.solve import solve_tasks

    settings = SolveSettings(steps=steps, seed=model.config.seed)
    return solve_tasks(model, tasks, settings, log=SolveLog()).evaluation
