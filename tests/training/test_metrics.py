"""`metrics.jsonl`: every line whole, rows that will be measured again taken out."""

from __future__ import annotations

import math

from rmoe.training.metrics import MetricsLog, read_metrics


def test_rows_and_what_json_lacks(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"kind": "train", "step": 1, "loss": math.nan, "gate_entropy": [1.0, math.inf]})
    assert read_metrics(log.path) == [{"kind": "train", "step": 1, "loss": None, "gate_entropy": [1.0, None]}]


def test_truncation_drops_later_rows_and_a_cut_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate(3)  # nothing there yet
    assert not log.path.exists()
    for step in (1, 2, 3):
        log.append({"kind": "train", "step": step})
    with log.path.open("ab") as file:
        file.write(b'{"kind":"train","st')
    log.truncate(2)
    log.append({"kind": "train", "step": 3, "again": True})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3]
    assert read_metrics(log.path)[-1] == {"kind": "train", "step": 3, "again": True}
    log.sync()
