"""Two processes (gloo) train the same model as one, and go on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rmoe.training.metrics import read_metrics
from tests.torchrun import torchrun
from tests.training import tiny
from tests.training.test_kill import SETTINGS

pytestmark = pytest.mark.slow

GLOBAL = ["--router", "smoe-global", "--model.hidden-dropout", "0", "--training.max-steps", "10"]


def run(text: Path, out: Path, ranks: int, *more: str) -> None:
    done = torchrun(
        "-m", "rmoe.cli.main", "train", "--data", str(text), "--out", str(out), *more, ranks=ranks
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def settings() -> list[str]:
    changed = dict(zip(GLOBAL[::2], GLOBAL[1::2], strict=True))
    kept = [pair for pair in zip(SETTINGS[::2], SETTINGS[1::2], strict=True) if pair[0] not in changed]
    return [*GLOBAL, *(token for name, value in kept for token in (name, value) if name != "--router-option")]


@pytest.fixture(scope="module")
def two(text, settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "two"
    run(text, out, 2, *settings)
    return out


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def test_losses_do_not_depend_on_the_number_of_ranks(text, settings, two, tmp_path):
    run(text, tmp_path / "one", 1, *settings)
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    one, other = (read_metrics(out / "metrics.jsonl")[-2] for out in (tmp_path / "one", two))
    assert one["kind"] == other["kind"] == "train"
    assert one["load_imbalance"] == other["load_imbalance"]  # counted over all ranks
    assert one["tokens"] == other["tokens"]


@pytest.mark.parametrize("ranks", [2, 1])
def test_resume(text, two, tmp_path, ranks):
    """Bit for bit on as many ranks; to rounding on another number."""
    out = tmp_path / "run"
    shutil.copytree(two, out)
    for path in ("model", "checkpoints/checkpoint-10"):
        shutil.rmtree(out / path)
    (out / "result.json").unlink()
    run(text, out, ranks, "--resume")
    assert losses(out) == pytest.approx(losses(two), abs=1e-6)
    if ranks == 2:
        assert tiny.weights(out) == tiny.weights(two)


def test_branch_of_on_two_ranks(text, settings, tmp_path):
    """Both ranks begin at the checkpoint; where it is missing both end, and neither waits for the other."""
    wsd = [*settings, "--training.schedule", "wsd", "--training.warmup-steps", "2"]
    steps = wsd.index("--training.max-steps")
    shorter = [*wsd[:steps], *wsd[steps + 2 :], "--training.max-steps"]
    run(text, tmp_path / "long", 2, *wsd, "--training.branch-points", "4")
    run(text, tmp_path / "whole", 2, *shorter, "5")
    run(text, tmp_path / "branch", 2, *shorter, "5", "--branch-of", str(tmp_path / "long"))
    assert tiny.weights(tmp_path / "branch") == tiny.weights(tmp_path / "whole")
    asked = [
        "--data",
        str(text),
        "--out",
        str(tmp_path / "no"),
        *shorter,
        "7",
        "--branch-of",
        str(tmp_path / "long"),
    ]
    done = torchrun("-m", "rmoe.cli.main", "train", *asked)
    assert done.returncode != 0
    assert "a run that kept checkpoint-6 (training.branch_points)" in done.stderr
    assert [path.name for path in (tmp_path / "no").iterdir()] == ["run.lock"]
