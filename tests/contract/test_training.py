"""Every row of the zoo trains 50 steps under `quick` (its own k where it has one) without NaN, and learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rmoe.routing import ZOO, find
from rmoe.training.config import RunConfig
from rmoe.training.metrics import read_metrics
from rmoe.training.run import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(ZOO))
def test_fifty_steps(name: str, tmp_path: Path) -> None:
    changes: dict[str, object] = {
        "router": name,
        "training.max_steps": 50,
        "logging.every": 10,
        "logging.evaluate_every": 50,
        "logging.evaluate_blocks": 8,
        "logging.final_blocks": 8,
    }
    if find(name).top_k is not None:
        changes["model.num_experts_per_tok"] = find(name).top_k
    config = RunConfig.from_preset("quick")
    for setting, value in changes.items():
        config = config.with_setting(setting, value)
    result = train(config, tmp_path / "run", progress=False)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert result.skipped_batches == 0
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["router_grad_norm"]) for row in rows)
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.5
    assert result.val is not None
    assert math.isfinite(result.val)
