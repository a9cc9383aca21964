"""What a run shows of its answers: a few held-out episodes watched over time, and examples of its last evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from qwen_fused.arc.episodes import Episode, Task, test_episodes
from qwen_fused.arc.scoring import Evaluation, Record
from qwen_fused.planner.model import QwenPlanner
from qwen_fused.report.answers import Example

WATCHED = 6
# of each kind: the best answers, those in the middle, the worst
EXAMPLES = {"nearest": 4, "in between": 4, "hardest": 4}


def watched_episodes(tasks: Iterable[Task], count: int = WATCHED) -> list[Episode]:
    """Episodes to look at again and again: the same in every run on these tasks, from small grids to large ones."""
    episodes = sorted(test_episodes(tasks), key=lambda e: (e.side, e.task_id, e.index))
    places = np.linspace(0, len(episodes) - 1, min(count, len(episodes))).round().astype(int)
    return [episodes[place] for place in np.unique(places)]


def watched_examples(episodes: Iterable[Episode], evaluation: Evaluation) -> list[Example]:
    """Those episodes as an evaluation answered them."""
    records = {(record.task_id, record.index): record for record in evaluation.records}
    return [answered(episode, records[episode.task_id, episode.index]) for episode in episodes]


def final_examples(model: QwenPlanner, tasks: Sequence[Task], evaluation: Evaluation) -> list[Example]:
    """Episodes of an evaluation of these tasks with all there is to draw: best, middling and worst by cells right."""
    episodes = test_episodes(tasks)
    scores = [record.score.cells if record.score else 0.0 for record in evaluation.records]
    order = sorted(range(len(episodes)), key=lambda k: -scores[k])
    _, middle, worst = EXAMPLES.values()
    starts = {"nearest": 0, "in between": len(order) // 2 - middle // 2, "hardest": len(order) - worst}
    kinds: dict[int, str] = {}
    for why, start in starts.items():
        for k in order[max(start, 0) :][: EXAMPLES[why]]:
            kinds.setdefault(k, why)
    return [
        replace(
            answered(episodes[k], evaluation.records[k]),
            plan=tuple(model.plan_steps(episodes[k])),
            backward=tuple(model.backward_steps(episodes[k])) if episodes[k].answer is not None else (),
            demonstrations=tuple((p.input, p.output) for p in episodes[k].demonstrations if p.output is not None),
            why=why,
        )
        for k, why in kinds.items()
    ]


def answered(episode: Episode, record: Record) -> Example:
    """An episode and its first attempt."""
    return Example(episode.task_id, episode.index, episode.query, episode.answer, record.attempts[0])
