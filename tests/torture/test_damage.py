"""Thirty-two kinds of damage to a run: said in one line, the newest whole checkpoint used, the same bits at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmoe.errors import RequestError
from rmoe.training import checkpoint as sealing
from rmoe.training.run import train
from tests.torture.conftest import AMOUNT
from tests.training import tiny

Damage = Callable[[Path], object]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


def link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def resealed(change: Damage) -> Damage:
    """Damage by someone who makes the seal right again: only what the files say can give it away."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / sealing.MANIFEST).read_text())["manifest"]
        change(folder)
        (folder / sealing.MANIFEST).unlink()
        sealing.seal(folder, manifest["step"], manifest["run"])

    return damage


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def edit(folder: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file(content, folder / file)

    return resealed(edit)


def state(**changes: object) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "training_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return resealed(edit)


def first(content: dict[str, torch.Tensor]) -> str:
    return max(content, key=lambda name: content[name].numel())


MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
FILES = (MODEL, OPTIMIZER, "rng.safetensors", "training_state.json", "config.json")

KINDS: dict[str, Damage] = {
    **{f"{file} removed": lambda f, file=file: (f / file).unlink() for file in (*FILES, sealing.MANIFEST)},
    **{f"{file} truncated": lambda f, file=file: os.truncate(f / file, 7) for file in (MODEL, "training_state.json")},
    **{f"{file} emptied": lambda f, file=file: os.truncate(f / file, 0) for file in (OPTIMIZER, sealing.MANIFEST)},
    **{f"a bit of {file}": lambda f, file=file: flip(f / file, -9) for file in (MODEL, OPTIMIZER, "rng.safetensors")},
    "a bit of the manifest": lambda f: flip(f / sealing.MANIFEST, 60),
    "two files swapped": lambda f: swap(f / MODEL, f / OPTIMIZER),
    "checkpoints swapped": lambda f: swap(f, f.with_name("checkpoint-18")),
    "empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "a file for the folder": lambda f: (shutil.rmtree(f), f.write_text("")),
    "a link for the folder": lambda f: link(f, f.parents[1] / "elsewhere"),
    "a dead link for the folder": lambda f: (shutil.rmtree(f), f.symlink_to(f.parents[1] / "nowhere")),
    "a file more": lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x04."),
    "a link for a file": lambda f: link(f / MODEL, f.parents[1] / "elsewhere"),
    "wrong shape, sealed": tensors(MODEL, lambda t: t.update({first(t): t[first(t)][:-1].clone()})),
    "wrong dtype, sealed": tensors(MODEL, lambda t: t.update({first(t): t[first(t)].double()})),
    "tensor missing, sealed": tensors(MODEL, lambda t: t.pop(first(t))),
    "tensor added, sealed": tensors(MODEL, lambda t: t.update({"extra": torch.zeros(1)})),
    "moment missing, sealed": tensors(OPTIMIZER, lambda t: t.pop(first(t))),
    "moment of another shape, sealed": tensors(OPTIMIZER, lambda t: t.update({first(t): t[first(t)][:-1].clone()})),
    "other model, sealed": resealed(lambda f: save_file({"a": torch.zeros(2)}, f / MODEL)),
    "step of another time, sealed": state(step=3),
    "another version, sealed": state(schema_version=99),
    "not safetensors, sealed": resealed(lambda f: (f / OPTIMIZER).write_bytes(b"PK\x03\x04" * 40)),
}  # fmt: skip
SHORT = ("a bit of model.safetensors", "moment missing, sealed", "empty folder", "a dead link for the folder")


def interrupted(finished: Path, out: Path) -> Path:
    """A copy of the run as if it had been killed right after its last checkpoint."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    return out


def test_there_are_thirty():
    assert len(KINDS) >= 30


@pytest.mark.parametrize("kind", KINDS if AMOUNT.everything else SHORT)
def test_damage_is_seen_and_the_run_ends_in_the_same_bits(kind, finished, text, tmp_path, capsys, note):
    out = interrupted(finished, tmp_path / "run")
    KINDS[kind](out / "checkpoints" / "checkpoint-20")
    train(tiny.config(text), out, resume=True, progress=False)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert said[0].startswith("skipped checkpoint-20: ")
    assert tiny.weights(out) == tiny.weights(finished)
    note(kind=f"damage: {kind}", said=said)


def test_a_lock_left_behind_is_no_obstacle(finished, text, tmp_path):
    out = interrupted(finished, tmp_path / "run")
    (out / "run.lock").write_text("process 1 on nowhere\n")
    train(tiny.config(text), out, resume=True, progress=False)
    assert tiny.weights(out) == tiny.weights(finished)


def test_all_damaged_starts_again(finished, text, tmp_path, capsys):
    out = interrupted(finished, tmp_path / "run")
    for step in (18, 20):
        flip(out / "checkpoints" / f"checkpoint-{step}" / MODEL, -1)
    train(tiny.config(text), out, resume=True, progress=False)
    assert "starting at step 0" in capsys.readouterr().err
    assert tiny.weights(out) == tiny.weights(finished)


def test_another_runs_checkpoint_is_refused(finished, text, tmp_path, capsys):
    other = tmp_path / "other"
    train(tiny.config(text, learning_rate=2e-3), other, progress=False)
    out = interrupted(finished, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "checkpoint-20")
    shutil.copytree(other / "checkpoints" / "checkpoint-20", out / "checkpoints" / "checkpoint-20")
    train(tiny.config(text), out, resume=True, progress=False)
    assert "skipped checkpoint-20: it belongs to another run" in capsys.readouterr().err
    assert tiny.weights(out) == tiny.weights(finished)


def test_other_data_is_refused(finished, text, tmp_path):
    out = interrupted(finished, tmp_path / "run")
    changed = tmp_path / "text.txt"
    changed.write_bytes(text.read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(RequestError, match="data_sha256"):
        train(tiny.config(changed), out, resume=True, progress=False)
