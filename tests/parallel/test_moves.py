"""One run, taken from layout to layout and from one number of processes to another: it ends where it would have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.test_launch import launch
from tests.training import tiny

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = [
    "--router-option", "recurrence.width=16", "--model.hidden-size", "32", "--model.num-hidden-layers", "4",
    "--model.num-attention-heads", "2", "--model.num-experts", "4", "--model.moe-intermediate-size", "16",
    "--model.hidden-dropout", "0", "--training.max-steps", str(STEPS), "--training.batch-size", "4",
    "--training.micro-batch-size", "1", "--training.sequence-length", "32", "--training.device", "cpu",
    "--training.schedule", "constant", "--training.warmup-steps", "2", "--logging.evaluate-blocks", "4",
    "--logging.evaluate-every", "12", "--logging.final-blocks", "4", "--logging.every", "1",
    "--checkpoints.every", "1", "--checkpoints.keep", str(STEPS),
]  # fmt: skip

LAYOUTS = {
    "one process": (1, {}),
    "FSDP2 of 4": (4, {"fsdp": 4}),
    "FSDP2 of 2": (2, {"fsdp": 2}),
    "DDP of 2": (2, {}),
    "FSDP2 and EP": (2, {"fsdp": 2, "expert": 2}),
    "TP": (2, {"tensor": 2}),
    "HSDP": (4, {"replicate": 2, "fsdp": 2}),
    "two pipelines": (4, {"replicate": 2, "pipeline": 2}),
    "DDP of 4": (4, {}),
}
PATH = [
    "FSDP2 of 2", "FSDP2 of 4", "TP", "DDP of 2", "FSDP2 and EP", "two pipelines", "HSDP", "DDP of 4", "one process",
]  # fmt: skip
"""From a run of one process on: whole checkpoints and sharded ones, each read by what wrote neither."""


def train(layout: str, text: Path, out: Path, *more: str) -> None:
    ranks, sizes = LAYOUTS[layout]
    options = {"fsdp": 1, "expert": 1, "replicate": 1, "tensor": 1, "pipeline": 1} | sizes
    given = [token for name, size in options.items() for token in (f"--parallel.{name}", str(size))]
    line = f"torchrun --nproc-per-node 2 -m rmoe.cli.main train --out {out} --data {text}"
    done = launch(line, *given, *more, ranks=ranks)
    assert done.returncode == 0, done.stderr


def test_from_layout_to_layout(tmp_path):
    text = tiny.text(tmp_path)
    train("one process", text, tmp_path / "0", *SETTINGS)
    expected = load_file(tmp_path / "0" / "model" / "model.safetensors")
    start = load_file(tmp_path / "0" / "checkpoints" / "checkpoint-1" / "model.safetensors")
    moved = {name: (expected[name] - tensor).norm() for name, tensor in start.items()}
    for number, layout in enumerate(PATH, 1):
        before, out = tmp_path / str(number - 1), tmp_path / str(number)
        out.mkdir()
        for name in ("config.json", "metrics.jsonl", f"checkpoints/checkpoint-{number}"):
            whole = before / name
            (shutil.copytree if whole.is_dir() else shutil.copy)(whole, out / name)
        train(layout, text, out, "--resume")
        found = load_file(out / "model" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # A lost moment, step count or schedule would show at the scale of what was learned.
            error = (found[name] - tensor).norm() / moved[name].clamp(min=1e-6)
            assert error < 1e-3, (layout, name, float(error))
        assert torch.isfinite(found["lm_head.weight"]).all()
