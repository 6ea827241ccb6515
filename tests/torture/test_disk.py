"""A disk that is really full: a small tmpfs, filled so that less and less is left when a run goes on.

Needs the right to mount (root, say); skipped elsewhere, where tests/training/test_checkpoint.py fails every single
write instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import rmoe
from rmoe.errors import RequestError, RunError
from rmoe.training.disk import bytes_of_a_run
from rmoe.training.run import train
from tests.torture.conftest import AMOUNT
from tests.torture.test_damage import interrupted
from tests.training import tiny

SHARES = [0.0, 0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97]
"""Of the space that one more checkpoint and the final model need."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # mapped weights may still hold it


def fill(disk: Path, leave: int) -> Path:
    filler = disk / "filler"
    space = os.statvfs(disk)
    filler.write_bytes(b"\0" * max(space.f_bavail * space.f_frsize - leave, 0))
    return filler


def test_what_cannot_fit_is_refused_before_it_begins(finished, text, tmp_path, monkeypatch):
    """The estimate covers what a run really holds, and is not far above it."""
    model = rmoe.load(finished / "model")
    needed = bytes_of_a_run(model, keep=2)
    real = [
        sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        for folder in (finished / "checkpoints" / "checkpoint-20", finished / "model")
    ]
    assert needed == pytest.approx(3 * real[0] + real[1], rel=0.1)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, needed - 1))
    with pytest.raises(RequestError, match="for 3 checkpoints and the model"):
        train(tiny.config(text), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", SHARES if AMOUNT.everything else SHARES[4:5])
def test_disk_full(share, finished, text, small_disk, note):
    out = interrupted(finished, small_disk / "run")
    newest = out / "checkpoints" / "checkpoint-20"
    needed = sum(path.stat().st_size for folder in (newest, finished / "model") for path in folder.iterdir())
    shutil.rmtree(newest)
    filler = fill(small_disk, int(share * needed))
    with pytest.raises(RunError) as caught:
        train(tiny.config(text), out, resume=True, progress=False)
    said = str(caught.value)
    assert "No space left on device" in said or "could not save" in said
    assert "saved: checkpoint-" in said
    assert "--resume" in said

    filler.unlink()
    train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)
    note(kind=f"disk full at {share:.0%}", said=said)
