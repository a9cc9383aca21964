"""What following a loss finds: cuts, values that left tensors, and the record of one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qwen_fused.proof.draws import Draw
from qwen_fused.proof.frames import Frame, Site
from qwen_fused.proof.labels import Labels
from qwen_fused.proof.replay import Gathered, PaddedRows, Record
from qwen_fused.proof.slots import Slot


@dataclass(frozen=True)
class Cut:
    """An operation behind which parameters get no gradient.

    Args:
        kind: detach, data, requires_grad, no_grad, decorated no_grad, inference_mode, item, tolist, numpy, new tensor,
            argmax, comparison, integer cast, non-differentiable, custom function, checkpoint, new leaf, branch, text,
            pointer, unseen, collective, or replaced.
        operation: what was called.
        file, line, function: where; for the gradient modes, what switched gradients off.
        parameters: names of the parameters lost there.
        inside: the library's own line when the user called the operation through a library, else None.
        at: the first operation lost, where that is another line than `line`, else None.
        callers: functions around the operation, as "file.py:function", innermost first.
    """

    kind: str
    operation: str
    file: str
    line: int
    function: str
    parameters: tuple[str, ...] = ()
    inside: Frame | None = None
    at: Frame | None = None
    callers: tuple[str, ...] = ()

    @property
    def frame(self) -> Frame:
        """Where, as a frame."""
        return Frame(self.file, self.line, self.function)

    def __str__(self) -> str:
        return f"{self.operation} at {self.frame}"


@dataclass(frozen=True)
class PartialCut:
    """A cut beside a way that still connects, and how much of the gradient it takes.

    Args:
        operation: what was called.
        frame: where.
        share: length of the gradient that flows through it over that of the whole, from 0 to 1; NaN where that can't be
            measured, or where the loss has next to no derivative without the cut: a straight-through estimator, a
            score function.
        parameters: names of the parameters that lose it.
        unknown: why the share can't be measured, empty where it was, or where there is nothing to lose.
    """

    operation: str
    frame: Frame
    share: float
    parameters: tuple[str, ...]
    unknown: str = ""


@dataclass
class Event:
    """A cut, or a departure (a value that left tensors), as it was met; `bit` is its label."""

    kind: str
    operation: str
    site: Site
    lost: int
    order: int = 0  # how many calls had been made before
    bit: int = 0
    at: Frame | None = None
    slot: Slot | None = None
    record: Record | PaddedRows | Gathered | None = None
    continues: bool = False  # whether that storage was used as a tensor later
    carried: bool = False  # whether it became a leaf that the user's own backward can carry on from
    aliased: bool = False  # whether its result was written through later
    stops: int = 0  # cuts that somebody detached what lies behind of: nothing more is expected of it

    def cut(self, labels: Labels, parameters: int) -> Cut:
        """The public form, for the given parameters."""
        user = self.site.user
        return Cut(
            kind=self.kind,
            operation=self.operation,
            file=user.file,
            line=user.line,
            function=user.function,
            parameters=labels.names_of(parameters),
            inside=self.site.inside,
            at=self.at if self.at != user else None,
            callers=self.site.callers,
        )


@dataclass
class CustomOp:
    """A call of a custom operation, whose backward is somebody's own mathematics."""

    slot: Slot
    name: str
    site: Site
    inputs: int  # parameters upstream
    surrogate: bool = False  # torch's own, whose backward is meant to be another than its forward's derivative
    draw: Draw | None = None


@dataclass
class Trace:
    """What one call of the loss function did."""

    labels: Labels
    loss: Any = None
    cuts: list[Event] = field(default_factory=list)
    departures: list[Event] = field(default_factory=list)
    fixed: list[Event] = field(default_factory=list)  # draws, and whatever may jump
    custom: list[CustomOp] = field(default_factory=list)
    hooks: list[Site] = field(default_factory=list)
    fresh: list[tuple[nn.Parameter, Site]] = field(default_factory=list)
    stale: list[tuple[int, Site]] = field(default_factory=list)
    kept: list[tuple[int, Site]] = field(default_factory=list)  # values of an earlier call, without its graph
    used: int = 0  # parameters that any operation read
    draws: dict[Slot, Draw] = field(default_factory=dict)  # every call that drew from a generator
    rewritten: int = 0  # parameters whose own values the loss function writes to
    differentiated: int = 0  # parameters upstream of what the loss function takes derivatives of
    differentiates: bool = False  # whether the loss function asks for gradients itself
    exchanges: bool = False  # whether it exchanges values with other processes
    compiled: list[Any] = field(default_factory=list)  # functions whose source was run in place of their compiled code
    threads: bool = False  # whether other threads were given something to do
    half: bool = False  # whether anything was computed in 16 bits
    named_after: dict[int, str] = field(default_factory=dict)  # id of a parameter -> its name when the call was over

    @property
    def depends_on(self) -> int:
        """Labels of the parameters that the loss's values depend on."""
        return self.labels.values(self.loss) if isinstance(self.loss, Tensor) else 0

    @property
    def alive(self) -> int:
        """Labels of the parameters that autograd connects the loss to."""
        return self.labels.alive(self.loss) if isinstance(self.loss, Tensor) else 0

    @property
    def through(self) -> int:
        """Labels of the cuts that the loss's values lie behind."""
        return self.labels.cuts(self.loss) if isinstance(self.loss, Tensor) else 0

    @property
    def reaching(self) -> list[Event]:
        """Cuts that the loss's values lie behind, in the order they were met."""
        return [event for event in self.cuts if event.bit & self.through]

    def held(self, *, carried: bool) -> dict[Slot, Record | PaddedRows | Gathered]:
        """What to hold still so that the loss is the function which autograd differentiates.

        Args:
            carried: whether the user's own backward carries the gradient on from leaves made behind cuts.
        """
        events = [e for e in self.cuts if e.bit & self.through and not e.aliased and not (carried and e.carried)]
        events += self.fixed + [e for e in self.departures if e.kind != "pointer"]
        return {e.slot: e.record for e in events if e.slot is not None and e.record is not None}
