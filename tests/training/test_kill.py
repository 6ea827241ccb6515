"""Real processes, really killed: SIGKILL and SIGTERM in mid-run, then on to the same bits, dropout on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import tiny

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--router-option", "recurrence.width=16", "--model.hidden-size", "32", "--model.num-hidden-layers", "2",
    "--model.num-attention-heads", "2", "--model.num-experts", "4", "--model.moe-intermediate-size", "16",
    "--model.hidden-dropout", "0.1", "--training.max-steps", "60", "--training.batch-size", "4",
    "--training.sequence-length", "32", "--training.device", "cpu", "--logging.evaluate-blocks", "4",
    "--logging.final-blocks", "4", "--logging.every", "5",
]  # fmt: skip


def start(text: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rmoe.cli.main", "train", "--data", str(text), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(out: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        folders = list((out / "checkpoints").glob("checkpoint-*"))
        if any(int(folder.name.split("-")[1]) >= step for folder in folders):
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint-{step}: {process.communicate()}")


def finish(process: subprocess.Popen) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout, stderr


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kill") / "whole"
    finish(start(text, out, *SETTINGS))
    return out


def test_kill_9_resume_finish(text, whole, tmp_path):
    out = tmp_path / "run"
    process = start(text, out, *SETTINGS)
    wait_for(out, 24, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "model").exists()

    stdout, stderr = finish(start(text, out, "--resume"))  # the settings are those of the run
    assert "resuming" in stderr
    assert stdout.startswith("rmoe: validation ")
    assert tiny.weights(out) == tiny.weights(whole)


@pytest.mark.slow
def test_killed_again_and_again(text, whole, tmp_path):
    out = tmp_path / "run"
    for step in (1, 12, 30, 48):
        process = start(text, out, *(SETTINGS if step == 1 else ["--resume"]))
        wait_for(out, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(text, out, "--resume"))
    assert tiny.weights(out) == tiny.weights(whole)
    assert "is finished already" in finish(start(text, out, "--resume"))[1]


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(text, whole, tmp_path):
    out = tmp_path / "run"
    process = start(text, out, *SETTINGS)
    wait_for(out, 6, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "SIGTERM: saving and stopping" in stderr
    assert "--resume goes on" in stderr
    assert "Traceback" not in stderr
    assert not (out / "result.json").exists()
    finish(start(text, out, "--resume"))
    assert tiny.weights(out) == tiny.weights(whole)


@pytest.mark.slow
def test_a_wsd_run_with_an_average_is_killed_and_ends_with_the_same_bits(text, tmp_path):
    """Killed before the average begins, and in the middle of it."""
    import json

    more = [
        *SETTINGS, "--training.schedule", "wsd", "--training.average", "5", "--training.average-every", "4",
        "--training.initial-logit-std", "1.0", "--training.router-learning-rate", "3e-3",
        "--training.branch-points", "20",
    ]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(start(text, whole, *more))
    for step in (20, 48):
        process = start(text, out, *(more if step == 20 else ["--resume"]))
        wait_for(out, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finish(start(text, out, "--resume"))
    assert tiny.weights(out) == tiny.weights(whole)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, whole)]
    for name in ("test", "averaged", "test_losses", "initial_logits", "layer_curves"):
        assert results[0][name] == results[1][name], name
    assert (out / "checkpoints" / "checkpoint-20").is_dir()
