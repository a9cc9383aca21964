"""The log line tells a trend: the means of the batches since the last one, in its own format."""

from __future__ import annotations

import json

import pytest
from report_runs import metrics_row

from qwen_fused.report.run_log import RunLog, mean_metrics


def row(step: int, **changes) -> dict:
    return {**metrics_row(step), **changes}


def test_log_line_has_the_means_since_the_last_one(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.metrics(row(1, reward=0.5, loss=4.0, qwen_grad=None, mask_ratio=0.25, accuracy=0.75))
    log.say_trend()
    for step, (reward, loss, grad, mask, accuracy) in enumerate(
        [(0.1, 1.0, None, 0.9, 0.1), (0.3, 2.0, 2e-4, 0.8, 0.2), (-0.1, 6.0, 4e-4, 0.4, 0.6)], start=2
    ):
        log.metrics(row(step, reward=reward, loss=loss, qwen_grad=grad, mask_ratio=mask, accuracy=accuracy))
    log.say_trend()
    log.metrics(row(5, reward=-0.25, loss=0.5, qwen_grad=1e-5, mask_ratio=0.5, accuracy=0.5))
    log.say_trend()
    log.close()
    lines = [
        "[Batch    1] Reward:  0.5000 | Loss:  4.0000 | Qwen_grad: -- | Mask_ratio: 0.2500 | Accuracy: 0.7500",
        # (0.1 + 0.3 - 0.1) / 3, (1 + 2 + 6) / 3, (2 + 4) / 2, (0.9 + 0.8 + 0.4) / 3, (0.1 + 0.2 + 0.6) / 3
        "[Batch    4] Reward:  0.1000 | Loss:  3.0000 | Qwen_grad: 3.00e-04 | Mask_ratio: 0.7000 | Accuracy: 0.3000",
        "[Batch    5] Reward: -0.2500 | Loss:  0.5000 | Qwen_grad: 1.00e-05 | Mask_ratio: 0.5000 | Accuracy: 0.5000",
    ]
    assert (tmp_path / "train.log").read_text().splitlines() == lines
    assert capsys.readouterr().out.splitlines() == lines
    # the file of metrics has each batch as it was
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == [4.0, 1.0, 2.0, 6.0, 0.5]


def test_a_batch_that_is_not_finite_is_left_out_of_the_mean():
    means = mean_metrics([row(1, loss=2.0), row(2, loss=float("nan")), row(3, loss=4.0)])
    assert (means["step"], means["loss"]) == (3, 3.0)
    assert mean_metrics([row(1, loss=float("inf"))])["loss"] == float("inf")
    assert mean_metrics([row(1, qwen_grad=None), row(2, qwen_grad=None)])["qwen_grad"] is None


def test_nothing_else_is_averaged():
    means = mean_metrics([row(1, lr_qwen=1.0, nonfinite=0), row(2, lr_qwen=0.5, nonfinite=1)])
    assert (means["lr_qwen"], means["nonfinite"], means["epoch"]) == (0.5, 1, 0)
    assert means["reward"] == pytest.approx(0.25)
