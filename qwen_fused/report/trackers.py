"""What a run sends elsewhere: TensorBoard where it is installed, trackio and Weights & Biases by name.

A tracker is a bystander. metrics.jsonl is the record of a run and does not pass through here; each package is imported
when its tracker is built; and one that fails is said once and dropped, while the run goes on.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen_fused.common.typed_yaml import nearest


class Tracker(Protocol):
    """One place that a run's numbers and pictures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one batch, by name."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, [h, w, 3] uint8."""

    def close(self) -> None:
        """Nothing comes after this."""


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir RUNS`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # what a resumed run does again takes the place of what it had done
        purge = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """A run of a package with the interface of Weights & Biases.

    Args:
        module: the package.
        options: of its `init`, besides project, name and configuration.
    """

    def __init__(self, module: Any, folder: Path, config: Mapping[str, Any], **options: Any):
        self.module = module
        name = folder.resolve().name
        self.run = module.init(project="qwen-fused", name=name, config=dict(config), resume="allow", **options)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: self.module.Image(pixels)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Hosted):
    """A local trackio project, kept in the run folder: `TRACKIO_DIR=RUN/trackio trackio show`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int | None):
        # read when the package is imported
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))
        import trackio

        super().__init__(trackio, folder, config, embed=False)


class Wandb(Hosted):
    """Weights & Biases, as the package itself is set up: WANDB_MODE=offline keeps all in the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int | None):
        import wandb

        super().__init__(wandb, folder, config, id=folder.resolve().name, dir=str(folder))


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def tracker_names(trackers: str) -> tuple[str, ...]:
    """The trackers that `--trackers` means: auto, none, or names with commas between.

    Raises:
        ValueError: there is no such tracker, or one that is asked for by name is not installed.
    """
    if trackers == "none":
        return ()
    if trackers == "auto":
        return ("tensorboard",) if _is_installed("tensorboard") else ()
    names = tuple(dict.fromkeys(name.strip() for name in trackers.split(",")))
    for name in names:
        if name not in TRACKERS:
            known = ("auto", "none", *TRACKERS)
            raise ValueError(
                f"trackers must be auto, none, or names of {', '.join(TRACKERS)} with commas between, "
                f"got {name!r}{nearest(name, known)}"
            )
        if not _is_installed(name):
            raise ValueError(f"trackers: {name} is not installed here; pip install {name}, or leave it out")
    return names


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # a mere folder of that name, as these packages leave behind, has no origin
    return spec is not None and spec.origin is not None


class Trackers:
    """Sends each thing to every tracker that still works.

    Args:
        names: trackers by name, as `tracker_names` gives them.
        folder: the run folder.
        config: the run's configuration, plain.
        resume_step: batches done before, of a resumed run.
        say: told, once for each tracker, that it failed.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        resume_step: int | None,
        say: Callable[[str], None],
    ):
        self._say = say
        self._working: dict[str, Tracker] = {}
        for name in names:
            tracker = self._try(name, partial(TRACKERS[name], folder, config, resume_step))
            if tracker is not None:
                self._working[name] = tracker

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one batch, by name."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, [h, w, 3] uint8."""
        self._each(lambda tracker: tracker.image(step, name, pixels))

    def close(self) -> None:
        """Close them all."""
        self._each(lambda tracker: tracker.close())
        self._working.clear()

    def __bool__(self) -> bool:
        return bool(self._working)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._working.items()):
            self._try(name, partial(act, tracker))

    def _try(self, name: str, act: Callable[[], Any]) -> Any:
        # whatever a package of somebody else raises, SystemExit included, is no reason to lose hours of training
        try:
            return act()
        except (Exception, SystemExit) as error:
            self._working.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(f"Tracker {name} failed and is left out from here on: {reason}")
            return None
