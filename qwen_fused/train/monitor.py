"""Watch a run's gradients and metrics, and say the remedy when a symptom shows.

Nothing here touches the device: it reads what `GradStats.to_dict()` (or `PendingStats.result()`) already brought to the
host, one row per layer of the watched group, and the metrics that are logged anyway.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_fused.common import device

REMEDIES = {
    "no gradient": "{group} is not in the loss graph: run `qwen-fused prove`, which names the line that cuts it",
    "dead layers": "these layers get no gradient though others do: `qwen-fused prove --json FILE` has every layer",
    "not finite": "{lower}, and look at the first bad tensor, which the norms name",
    "exploding": "{lower}",
    "flat": "check the weighted mask (mask ratio {mask_ratio}), the clipping and the learning rate (qwen {lr_qwen})",
    "no reward": "the policy changes nothing: look at its delta and its gate",
    "no graph": "each operation is launched by itself from here on, as with --cuda-graphs off",
    "out of memory": "pass --no-prove if that was in the proof; --window-mode recompute or --gradient-checkpointing, "
    "which cost time alone; else a smaller "
    "--batch-size or --max-prompt-tokens, --lora-rank 8, or --qwen-dtype bfloat16",
}


@dataclass(frozen=True)
class Hint:
    """A symptom that showed, and what to do.

    Args:
        symptom: a key of REMEDIES.
        step: batch at which it showed, None for an error.
        seen: what was seen, with its figures.
        remedy: what to do.
    """

    symptom: str
    step: int | None
    seen: str
    remedy: str

    def __str__(self) -> str:
        where = f"batch {self.step}: " if self.step is not None else ""
        return f"hint: {where}{self.seen}; {self.remedy}"


def out_of_memory(error: BaseException) -> Hint | None:
    """The hint for an error that says that memory ran out, on the device or the host; None for any other."""
    if not device.out_of_memory(error):
        return None
    text = str(error)
    seen = text.splitlines()[0] if text else "out of memory"
    return Hint("out of memory", None, seen, REMEDIES["out of memory"])


@dataclass
class GradientMonitor:
    """Raises each symptom's hint once, and again only after the symptom has gone.

    Args:
        group: the gradient group to watch; its rows are "group" and "group/part".
        patience: batches that a gradient or a reward may be zero, and the length over which losses are averaged.
        explodes_at: loss, averaged over a fifth of the patience, over its lowest such average so far.
        flat_within: relative spread of the averages of three periods of `patience` batches that counts as flat.
        qwen_lr: the learning rate that was asked for, which advice starts from.
    """

    group: str = "qwen"
    patience: int = 100
    explodes_at: float = 3.0
    flat_within: float = 0.005
    qwen_lr: float | None = None
    layers_zero_for: dict[str, int] = field(default_factory=dict)
    total_zero_for: int = 0

    def __post_init__(self) -> None:
        if self.patience < 5:
            raise ValueError(f"patience must be at least 5 batches, got {self.patience}")
        self._recent: deque[float] = deque(maxlen=max(1, self.patience // 5))
        self._period: list[float] = []
        self._periods: deque[float] = deque(maxlen=3)
        self._lowest = math.inf
        self._no_reward_for = 0
        self._raised: set[str] = set()

    def observe(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        gradients: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[Hint]:
        """Take in one batch; return the hints for symptoms that newly show.

        Args:
            step: number of the batch.
            metrics: loss, reward, mask_ratio, lr_qwen and qwen_grad as far as there are any; None is skipped.
            gradients: group or group/part -> row with "norm", as `GradStats.to_dict` gives it; wins over qwen_grad.
        """
        shows: dict[str, str] = {}
        shows |= self._look_at_gradients(metrics, gradients or {})
        shows |= self._look_at_loss(metrics.get("loss"))
        shows |= self._look_at_reward(metrics.get("reward"))
        new = [symptom for symptom in shows if symptom not in self._raised]
        self._raised = set(shows)
        return [Hint(symptom, step, shows[symptom], self._remedy(symptom, metrics)) for symptom in new]

    def _look_at_gradients(
        self, metrics: Mapping[str, float | None], gradients: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, str]:
        total = gradients[self.group]["norm"] if self.group in gradients else metrics.get(f"{self.group}_grad")
        if total is None:
            return {}
        # NaN and Inf are not zero
        self.total_zero_for = self.total_zero_for + 1 if total == 0 else 0
        for name, row in gradients.items():
            if name.startswith(f"{self.group}/"):
                layer = name.removeprefix(f"{self.group}/")
                self.layers_zero_for[layer] = self.layers_zero_for.get(layer, 0) + 1 if row["norm"] == 0 else 0
        if self.total_zero_for >= self.patience:
            return {"no gradient": f"the gradient of {self.group} has been 0 for {self.total_zero_for} batches"}
        dead = [name for name, zero_for in self.layers_zero_for.items() if zero_for >= self.patience]
        if dead:
            return {"dead layers": f"no gradient in {', '.join(dead)} of {self.group} for {self.patience} batches"}
        return {}

    def _look_at_loss(self, loss: float | None) -> dict[str, str]:
        if loss is None:
            return {}
        if not math.isfinite(loss):
            return {"not finite": f"the loss is {loss}"}
        self._recent.append(loss)
        self._period.append(loss)
        if len(self._period) == self.patience:
            self._periods.append(sum(self._period) / self.patience)
            self._period.clear()
        shows = {}
        if len(self._recent) == self._recent.maxlen:
            now = sum(self._recent) / len(self._recent)
            if self._lowest > 0 and now > self.explodes_at * self._lowest:
                shows["exploding"] = f"the loss went from {self._lowest:.4g} to {now:.4g}"
            self._lowest = min(self._lowest, now)
        if len(self._periods) == 3:
            low, high = min(self._periods), max(self._periods)
            if high - low <= self.flat_within * max(abs(low), abs(high)):
                shows["flat"] = f"the loss has stayed at {self._periods[-1]:.4g} for {3 * self.patience} batches"
        return shows

    def _look_at_reward(self, reward: float | None) -> dict[str, str]:
        if reward is None:
            return {}
        self._no_reward_for = self._no_reward_for + 1 if reward == 0 else 0
        if self._no_reward_for >= self.patience:
            return {"no reward": f"the reward has been exactly 0 for {self._no_reward_for} batches"}
        return {}

    def _remedy(self, symptom: str, metrics: Mapping[str, float | None]) -> str:
        figures = {name: metrics.get(name) for name in ("mask_ratio", "lr_qwen")}
        written = {name: "not given" if value is None else f"{value:.3g}" for name, value in figures.items()}
        # the flag is the peak, whatever the schedule makes of it
        fifth = "lower the learning rate to a fifth"
        lower = fifth if self.qwen_lr is None else f"lower --qwen-lr from {self.qwen_lr:g} to {self.qwen_lr / 5:g}"
        return REMEDIES[symptom].format(group=self.group, lower=lower, **written)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {
            "layers": {name: {"zero_for": zero_for} for name, zero_for in self.layers_zero_for.items()},
            "total": {"zero_for": self.total_zero_for},
            "recent": list(self._recent),
            "period": list(self._period),
            "periods": list(self._periods),
            "lowest": self._lowest,
            "no_reward_for": self._no_reward_for,
            "raised": sorted(self._raised),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.layers_zero_for = {name: layer["zero_for"] for name, layer in state["layers"].items()}
        self.total_zero_for = state["total"]["zero_for"]
        self._recent.extend(state["recent"])
        self._period = list(state["period"])
        self._periods.extend(state["periods"])
        self._lowest = state["lowest"]
        self._no_reward_for = state["no_reward_for"]
        self._raised = set(state["raised"])
