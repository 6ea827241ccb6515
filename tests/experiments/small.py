"""A study small enough to train in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from experiments import study


def small_study(routers: list[str], layers: int = 1, seeds: int = 1, **training: Any) -> study.Study:
    """`study.toml` with one grid, `std-1`, of tiny models that train for ten steps; `training` is changed."""
    size = {
        "model": {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "num_experts": 2},
        "training": {
            "max_steps": 10, "batch_size": 2, "sequence_length": 16, "warmup_steps": 1, "threads": 1,
            "average": 2, "average_every": 5, "schedule": "wsd", **training,
        },
        "logging": {"evaluate_blocks": 2, "final_blocks": 2, "test_blocks": 2},
    }  # fmt: skip
    stage = study.Stage(name="one", seeds=seeds, grid=[study.Grid(folder="std-1", routers=routers)])
    return msgspec.structs.replace(study.read_study(), size=size, stage=[stage])


def write_text(folder: Path) -> Path:
    """What they train on."""
    path = folder / "text.txt"
    path.write_text("".join(f"line {i * 7919 % 101}\n" for i in range(3000)))
    return path
