"""Runs as `rmoe runs` sees them: a real one in each state, told apart by files and the lock alone."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from rmoe.cli.main import main
from rmoe.training.listing import find_runs, is_locked, status_of
from rmoe.training.run import train
from rmoe.training.run_folder import locked
from tests.training import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listing")
    train(tiny.config(tiny.text(folder)), folder / "runs" / "finished", progress=False)
    return folder / "runs" / "finished"


def unfinished(finished: Path, tmp_path: Path, *checkpoints: int) -> Path:
    folder = tmp_path / "runs" / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    for step in checkpoints:
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    return folder


def test_finished(finished):
    (status,) = find_runs(finished.parents[1])
    assert (status.state, status.step, status.steps) == ("finished", tiny.STEPS, tiny.STEPS)
    assert status.loss is not None
    assert status.validation is not None
    assert status.checkpoint == tiny.STEPS
    assert status.seconds_left is None


def test_running_is_asked_of_the_kernel(finished, tmp_path):
    folder = unfinished(finished, tmp_path)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[: len(rows) // 2]))
    with locked(folder):
        status = status_of(folder)
    assert status.state == "running"
    assert status.seconds_left is not None
    assert status.seconds_left > 0


def test_who_looks_at_a_lock_does_not_keep_a_run_from_starting(tmp_path):
    with locked(tmp_path):
        pass
    look = os.open(tmp_path / "run.lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)  # as `is_locked` does
    threading.Timer(0.05, os.close, [look]).start()
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_stopped_died_and_not_begun(finished, tmp_path):
    folder = unfinished(finished, tmp_path)
    assert status_of(folder).state == "stopped"  # the last step is in a checkpoint
    shutil.rmtree(folder / "checkpoints" / f"checkpoint-{tiny.STEPS}")
    assert status_of(folder).state == "died"
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()
    assert status_of(folder).state == "not begun"


def test_command(finished, tmp_path, capsys):
    assert main(["runs", str(finished.parent)]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["runs", str(finished.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "finished"
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no runs in ")
    assert main(["runs", str(tmp_path / "nowhere")]) == 2


def test_hostile_folders_are_passed_over_and_names_are_shown_harmless(finished, tmp_path, capsys):
    for name, content in (("a", b"{"), ("b", b"[]"), ("c", b"\xff"), ("d", b'{"schema_version": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
        (tmp_path / name / "run.lock").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    shutil.copytree(finished, tmp_path / "\x1b[31mred\n")
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\n") == 2
