"""The report of a proof: five rungs, what broke each of them, and how it reads on a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_fused.proof.cuts import Cut, PartialCut
from qwen_fused.proof.frames import NOWHERE, Frame

if TYPE_CHECKING:
    from rich.text import Text

# share of the gradient from which on a cut beside a way that connects is told in the headline
MOST_LOST = 0.1
RUNGS = ("declared", "connected", "nonzero", "correct", "applied")


@dataclass(frozen=True)
class Finding:
    """One fault.

    Args:
        kind: what it is: a cut's kind, or frozen, not in the optimizer, in two groups, eval mode, created late, zero,
            non-finite, wrong, erased, fresh, stale cache, not moved, learning rate 0, and so on.
        detail: one sentence.
        parameters: names of the parameters concerned.
        frame: the line, or None where there is none.
        inside: the library's own line when the user called it through a library, else None.
    """

    kind: str
    detail: str
    parameters: tuple[str, ...] = ()
    frame: Frame | None = None
    inside: Frame | None = None

    @property
    def file(self) -> str | None:
        """File of the line, or None."""
        return self.frame.file if self.frame else None

    @property
    def line(self) -> int | None:
        """Line number, or None."""
        return self.frame.line if self.frame else None


@dataclass
class Rung:
    """One rung of the ladder.

    Args:
        name: declared, connected, nonzero, correct or applied.
        ok: True, False, or None where it could not be judged.
        detail: one line of what was found.
        findings: the faults, none where it holds.
        asked: False where the caller gave nothing to judge, such as no optimizer.
    """

    name: str
    ok: bool | None
    detail: str
    findings: list[Finding] = field(default_factory=list)
    asked: bool = True

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that fail here."""
        return tuple(dict.fromkeys(name for finding in self.findings for name in finding.parameters))


@dataclass(frozen=True)
class Enlarged:
    """Gradients that are longer than backward made them when the optimizer uses them, while others are not.

    Args:
        parameters: whose gradients.
        factor: by which the most enlarged one is longer.
        frame: the line that does it, None where it was not found.
    """

    parameters: tuple[str, ...]
    factor: float
    frame: Frame | None

    @property
    def told(self) -> str:
        """All that in one sentence."""
        place = f" at {self.frame}" if self.frame else ""
        many = "up to " if len(self.parameters) > 1 else ""
        whose = name_some(self.parameters, 1)
        return f"the gradient of {whose} is made {many}{self.factor:.3g} times as long{place}"


@dataclass
class ProofReport:
    """What `prove` found; printing it shows the ladder.

    Args:
        rungs: name -> rung, in the order of climbing.
        cut: the first operation that loses the gradient of a named parameter, or None.
        notes: no faults, but worth knowing: partial cuts, places not seen through, allowances that matched nothing.
        partial_cuts: cuts beside a way that connects, with the share of the gradient that each takes.
        enlarged: gradients that something between backward and the optimizer makes longer, while others are not.
        allowed: entry of `allow` -> how many cuts and parameters it matched.
        layers: per layer: number of parameters, gradient norm, largest element, tensors that are zero or not finite;
            of the gradient without its loss scale.
        parameters: how many parameters were judged.
        loss: value of the loss, None when it is no number.
        evaluations: how often the loss function was called.
        seconds: how long the proof took.
    """

    rungs: dict[str, Rung]
    cut: Cut | None = None
    notes: list[str] = field(default_factory=list)
    partial_cuts: list[PartialCut] = field(default_factory=list)
    enlarged: Enlarged | None = None
    allowed: dict[str, int] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    parameters: int = 0
    loss: float | None = None
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every rung that there was something to judge by holds."""
        return all(rung.ok is True or (rung.ok is None and not rung.asked) for rung in self.rungs.values())

    @property
    def verdict(self) -> str:
        """ "proved", "broken" (a rung fails), or "not proved" (a rung could not be judged)."""
        if any(rung.ok is False for rung in self.rungs.values()):
            return "broken"
        return "proved" if self.ok else "not proved"

    @property
    def headline(self) -> str:
        """The verdict, and of a gradient that is proved the cut that takes most of it, where that is above a tenth.

        A cut whose share can't be measured is told too, and so is a gradient that is made longer while others are not.
        """
        if self.verdict != "proved":
            return self.verdict
        change = [f"with a change: {self.enlarged.told}"] if self.enlarged else []
        return ", ".join([self.verdict, *self._large_cut(), *change])

    def _large_cut(self) -> list[str]:
        large = [cut for cut in self.partial_cuts if cut.share > MOST_LOST or cut.unknown]
        if not large:
            return []
        most = max(large, key=lambda cut: -1.0 if cut.unknown else cut.share)
        others = f" ({len(large) - 1} more below)" if len(large) > 1 else ""
        share = "an unknown share" if most.unknown else f"{most.share:.0%}"
        taken = f"{share} of the gradient of {name_some(most.parameters, 1)}"
        return [f"with a cut: {most.operation} at {most.frame} takes {taken}{others}"]

    @property
    def findings(self) -> list[Finding]:
        """Every fault, rung by rung."""
        return [finding for rung in self.rungs.values() for finding in rung.findings]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        rungs = {
            name: {
                "ok": rung.ok,
                "asked": rung.asked,
                "detail": rung.detail,
                "parameters": list(rung.parameters),
                "findings": [
                    {
                        "kind": f.kind,
                        "detail": f.detail,
                        "parameters": list(f.parameters),
                        "file": f.file,
                        "line": f.line,
                        "function": f.frame.function if f.frame else None,
                        "source": f.frame.source if f.frame else None,
                        "inside": dataclasses.asdict(f.inside) if f.inside else None,
                    }
                    for f in rung.findings
                ],
            }
            for name, rung in self.rungs.items()
        }
        told = ("rungs", "cut", "partial_cuts", "enlarged")
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in told}
        rest["partial_cuts"] = [dataclasses.asdict(cut) for cut in self.partial_cuts]
        rest["enlarged"] = dataclasses.asdict(self.enlarged) if self.enlarged else None
        cut = dataclasses.asdict(self.cut) | {"source": self.cut.frame.source} if self.cut else None
        return {"ok": self.ok, "verdict": self.verdict, "headline": self.headline, "rungs": rungs, "cut": cut, **rest}

    def __rich__(self) -> Text:
        # here, as the ops that share the package do without it
        from rich.text import Text

        text = Text()
        colour = {"proved": "bold green", "broken": "bold red", "not proved": "bold yellow"}[self.verdict]
        word, _, cut = self.headline.partition(", ")
        text.append(f"gradient {word}", colour)
        text.append(f", {cut}" if cut else "", "bold yellow")
        text.append(f"   {self.parameters} parameters, {self.evaluations} evaluations, {self.seconds:.1f} s\n")
        for number, rung in enumerate(self.rungs.values(), 1):
            self._write_rung(text, number, rung)
        for note in self.notes:
            text.append(f"  note: {note}\n", "dim")
        text.right_crop(1)
        return text

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, no_color=True, highlight=False, force_terminal=False)
        with console.capture() as capture:
            console.print(self.__rich__(), soft_wrap=True)
        return capture.get().rstrip("\n")

    @staticmethod
    def _write_rung(text: Text, number: int, rung: Rung) -> None:
        word, colour = {True: ("ok", "green"), False: ("BROKEN", "red"), None: ("not judged", "yellow")}[rung.ok]
        text.append(f"  {number} {rung.name:<10}")
        text.append(f"{word:<11}", colour)
        text.append(f" {rung.detail}\n")
        for finding in rung.findings:
            text.append(f"      {finding.kind}", "red")
            text.append(f": {finding.detail}\n")
            for frame, prefix in ((finding.frame, "at "), (finding.inside, "inside ")):
                if frame is not None and frame != NOWHERE.user:
                    text.append(f"        {prefix}{frame}\n", "bold")
                    if frame.source and prefix == "at ":
                        text.append(f"            {frame.source}\n", "cyan")


def name_some(names: Iterable[str], most: int = 3) -> str:
    """A few of the names and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
