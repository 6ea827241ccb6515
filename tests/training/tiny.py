"""A run small enough for a test: two layers, twenty steps, dropout on."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

from rmoe.data.config import DataConfig
from rmoe.training.config import LoggingConfig, ModelConfig, RunConfig, TrainingConfig

STEPS = 20


def text(folder: Path) -> Path:
    """Some 100 kB of real text that every machine has: a module of the standard library."""
    path = folder / "text.txt"
    path.write_bytes(Path(argparse.__file__).read_bytes())
    return path


def config(path: Path, **training: object) -> RunConfig:
    """A configuration on that text; `training` changes settings of that table."""
    return RunConfig(
        router="rmoe",
        router_option=("recurrence.width=16",),
        model=ModelConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=4,
            moe_intermediate_size=16,
            hidden_dropout=0.1,
            attention_dropout=0.1,
        ),
        data=DataConfig(path=str(path)),
        training=replace(
            TrainingConfig(
                max_steps=STEPS, batch_size=4, sequence_length=32, warmup_steps=4, threads=1, device="cpu"
            ),
            **training,  # type: ignore[arg-type]
        ),
        logging=LoggingConfig(every=3, evaluate_blocks=8, final_blocks=8),
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(out: Path) -> str:
    """What a finished run has learned, as one hash."""
    return sha256(out / "model" / "model.safetensors")
