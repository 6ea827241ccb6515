"""Checkpoint folders: whole or not there, checked before use, rotated without risk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rmoe.errors import RunError
from rmoe.training import checkpoint as module
from rmoe.training.checkpoint import MANIFEST, CheckpointStore, Damaged, seal, verify

RUN = "run-a"


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "optimizer.safetensors").write_bytes(b"moments" * 1000)
    (folder / "state.json").write_text("{}")


def save(store: CheckpointStore, step: int, fill: Callable[[Path], None]) -> Path:
    with store.staged(step) as folder:
        fill(folder)
    return store.checkpoints / f"checkpoint-{step}"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, RUN)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.checkpoints.iterdir())


def test_saved_checkpoint_is_found_and_whole(store, capsys):
    save(store, 20, write)
    path = save(store, 100, write)
    assert store.newest_valid() == path == store.checkpoints / "checkpoint-100"  # by number, not by name
    verify(path, 100, RUN)
    assert capsys.readouterr().err == ""
    assert names(store) == ["checkpoint-100", "checkpoint-20"]


def test_rotation_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, RUN, keep=3)
    for step in (1, 2, 9, 10, 11):
        save(store, step, write)
    assert [step for step, _ in store.found()] == [9, 10, 11]
    assert list(store.staging.iterdir()) == []


def test_rotation_counts_only_valid_ones(store):
    save(store, 1, write)
    save(store, 2, write)
    (store.checkpoints / "checkpoint-2" / "state.json").write_text("{ }")
    save(store, 3, write)
    assert [step for step, _ in store.found()] == [1, 2, 3]  # 1 and 3 are the two valid ones
    save(store, 4, write)
    assert [step for step, _ in store.found()] == [3, 4]


def flip_bit(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change the manifest and make its own sha256 right again, as an edit by hand would not."""
    sealed = json.loads((folder / MANIFEST).read_text())
    manifest = module.msgspec.convert(sealed["manifest"] | changes, module.CheckpointManifest)
    module_sealed = module.SealedManifest(manifest=manifest, sha256=module._own_sha256(manifest))
    (folder / MANIFEST).write_bytes(module.msgspec.json.encode(module_sealed))


def swap(a: Path, b: Path) -> None:
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


def outside(folder: Path) -> None:
    """A manifest that names a file above its folder, with the right sha256."""
    secret = folder.parent / "secret"
    secret.write_text("secret")
    sealed = json.loads((folder / MANIFEST).read_text())["manifest"]["files"]
    entry = {"bytes": secret.stat().st_size, "sha256": module.sha256(secret)}
    edit_manifest(folder, files=sealed | {"../secret": entry})


def link(folder: Path) -> None:
    path = folder / "state.json"
    copy = folder.parent / "state-elsewhere.json"
    shutil.move(path, copy)
    path.symlink_to(copy)


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 10), "size mismatch: model.safetensors"),
    "emptied": (
        lambda f: os.truncate(f / "optimizer.safetensors", 0),
        "size mismatch: optimizer.safetensors",
    ),
    "bit": (lambda f: flip_bit(f / "model.safetensors"), "sha256 mismatch: model.safetensors"),
    "last bit": (
        lambda f: flip_bit(f / "optimizer.safetensors", -1),
        "sha256 mismatch: optimizer.safetensors",
    ),
    "longer": (lambda f: (f / "state.json").write_text("{}\n"), "size mismatch: state.json"),
    "no model": (lambda f: (f / "model.safetensors").unlink(), "missing file: model.safetensors"),
    "no optimizer": (lambda f: (f / "optimizer.safetensors").unlink(), "missing file: optimizer.safetensors"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json"),
    "empty manifest": (lambda f: (f / MANIFEST).write_text(""), "unreadable manifest.json"),
    "manifest cut": (lambda f: os.truncate(f / MANIFEST, 150), "unreadable manifest.json"),
    "manifest not utf-8": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"), "unreadable manifest.json"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[]"), "unreadable manifest.json"),
    "manifest edited": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"bytes": 2', '"bytes": 3')),
        "sha256 mismatch: manifest.json",
    ),
    "other step": (lambda f: edit_manifest(f, step=30), "its manifest is of step 30"),
    "other version": (lambda f: edit_manifest(f, schema_version=99), "manifest version 99, not 1"),
    "other run": (lambda f: edit_manifest(f, run="run-b"), "it belongs to another run"),
    "path outside": (outside, "missing file: ../secret"),
    "swapped": (
        lambda f: swap(f / "model.safetensors", f / "optimizer.safetensors"),
        "sha256 mismatch: model.safetensors",
    ),
    "extra file": (
        lambda f: (f / "pytorch_model.bin").write_text("x"),
        "file not in the manifest: pytorch_model.bin",
    ),
    "folder for file": (
        lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
        "not a plain file: state.json",
    ),
    "link for file": (link, "not a plain file: state.json"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_in_one_line_and_the_older_one_used(store, capsys, kind):
    damage, reason = DAMAGE[kind]
    older = save(store, 20, write)
    damage(save(store, 40, write))
    assert store.newest_valid() == older
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"skipped checkpoint-40: {reason}")


def test_a_long_reason_is_not_wrapped(store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    os.truncate(save(store, 40, write) / "optimizer.safetensors", 3)
    assert store.newest_valid() is None
    assert capsys.readouterr().err == "skipped checkpoint-40: size mismatch: optimizer.safetensors\n"


def test_checkpoint_folders_swapped(store, capsys):
    one, two = save(store, 20, write), save(store, 40, write)
    one.rename(store.folder / "aside")
    two.rename(one)
    (store.folder / "aside").rename(two)
    assert store.newest_valid() is None
    err = capsys.readouterr().err
    assert "skipped checkpoint-40: its manifest is of step 20\n" in err
    assert "skipped checkpoint-20: its manifest is of step 40\n" in err


def test_what_is_no_checkpoint_is_not_looked_at(store, capsys):
    path = save(store, 40, write)
    (store.checkpoints / "notes.txt").write_text("x")
    (store.checkpoints / "checkpoint-final").mkdir()
    (store.checkpoints / "checkpoint-050").mkdir()
    assert store.newest_valid() == path
    assert capsys.readouterr().err == ""


def test_what_only_has_a_checkpoints_name_is_skipped_and_gives_way(store, capsys):
    path = save(store, 40, write)
    (store.checkpoints / "checkpoint-60").symlink_to(path)
    (store.checkpoints / "checkpoint-80").symlink_to(store.folder / "nowhere")
    (store.checkpoints / "checkpoint-100").write_text("x")
    assert store.newest_valid() == path
    assert capsys.readouterr().err.splitlines() == [
        f"skipped checkpoint-{step}: not a plain folder" for step in (100, 80, 60)
    ]
    assert store.saved() == f"checkpoint-40 in {store.checkpoints}"
    for step in (60, 80, 100):
        save(store, step, write)
    assert store.newest_valid() == store.checkpoints / "checkpoint-100"


def test_a_further_check_may_refuse(store, capsys):
    older, newer = save(store, 20, write), save(store, 40, write)

    def check(folder: Path) -> None:
        if folder == newer:
            raise Damaged("model.safetensors: lm_head.weight is missing")

    assert store.newest_valid(check) == older
    assert capsys.readouterr().err == "skipped checkpoint-40: model.safetensors: lm_head.weight is missing\n"


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(store):
    flip_bit(save(store, 40, write) / "model.safetensors")
    path = save(store, 40, write)
    verify(path, 40, RUN)
    assert names(store) == ["checkpoint-40"]


# Every call that can meet a full disk: the writes of the content, each fsync, the manifest, the rename.
FULL_AT = ["write", *(f"sync {n}" for n in range(1, 6)), "manifest", "mkdir", "rename"]


@pytest.mark.parametrize("point", FULL_AT)
def test_disk_full_leaves_the_last_checkpoint_whole(store, monkeypatch, point):
    last = save(store, 20, write)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: object, **kwargs: object) -> None:
        raise full

    content = write
    with monkeypatch.context() as patched:
        if point == "write":

            def content(folder: Path) -> None:
                write(folder)
                raise full

        elif point.startswith("sync"):
            countdown = [int(point.split()[1])]

            def sync(path: Path) -> None:
                countdown[0] -= 1
                if countdown[0] == 0:
                    raise full

            patched.setattr(module, "sync", sync)
        elif point == "manifest":
            patched.setattr(Path, "write_bytes", lambda self, data: fail() if self.name == MANIFEST else None)
        else:
            patched.setattr(Path, point, fail)
        with pytest.raises(RunError) as caught:
            save(store, 40, content)
    assert "could not save checkpoint-40: [Errno 28] No space left on device" in str(caught.value)
    assert f"saved: checkpoint-20 in {store.checkpoints}" in str(caught.value)
    assert store.newest_valid() == last
    assert names(store) == ["checkpoint-20"]

    path = save(store, 40, write)  # once there is space, nothing is in the way
    assert store.newest_valid() == path


def test_a_kill_while_staging_leaves_nothing_behind(store):
    staged = store.staging / "checkpoint-40"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text("half")
    assert store.newest_valid() is None
    store.clear_staging()
    assert not store.staging.exists()
    assert save(store, 40, write) == store.newest_valid()


def test_seal_covers_every_file(tmp_path):
    write(tmp_path)
    seal(tmp_path, 5, RUN)
    sealed = json.loads((tmp_path / MANIFEST).read_text())
    assert sorted(sealed["manifest"]["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    verify(tmp_path, 5, RUN)


def test_a_checkpoint_is_published_only_after_its_bytes_are_on_disk(store, monkeypatch):
    """Every file, then the manifest, then their folder; the rename; and then the folder that holds the new name."""
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        happened.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{store.folder}/")))
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        happened.append(("rename", str(target).removeprefix(f"{store.folder}/")))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    save(store, 40, write)
    staged = "staging/checkpoint-40"
    assert happened == [
        ("sync", f"{staged}/model.safetensors"),
        ("sync", f"{staged}/optimizer.safetensors"),
        ("sync", f"{staged}/state.json"),
        ("sync", f"{staged}/{MANIFEST}"),
        ("sync", staged),
        ("rename", "checkpoints/checkpoint-40"),
        ("sync", "checkpoints"),
    ]


def test_the_same_files_give_the_same_manifest(tmp_path):
    """Whatever order the folder lists them in."""
    names = [f"part-{i * 7919 % 100:02d}" for i in range(40)]
    manifests = []
    for number, order in enumerate((names, names[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in order:
            (folder / name).write_text(name)
        seal(folder, 5, RUN)
        manifests.append((folder / MANIFEST).read_text())
    assert manifests[0] == manifests[1]
    files = json.loads(manifests[0])["manifest"]["files"]
    assert list(files) == sorted(names)
    assert files["part-19"] == {"bytes": 7, "sha256": hashlib.sha256(b"part-19").hexdigest()}


def test_a_file_that_cannot_be_read_is_damage(store, monkeypatch, capsys):
    older = save(store, 20, write)
    bad = save(store, 40, write) / "optimizer.safetensors"
    plain = module.sha256

    def read(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return plain(path)

    monkeypatch.setattr(module, "sha256", read)
    assert store.newest_valid() == older
    assert "unreadable optimizer.safetensors: [Errno 5] Input/output error" in capsys.readouterr().err


def test_rotation_needs_no_staging_folder(tmp_path):
    store = CheckpointStore(tmp_path, RUN, keep=3)
    for step in (1, 2, 3):
        save(store, step, write)
    store.clear_staging()
    CheckpointStore(tmp_path, RUN, keep=2).rotate(3)
    assert [step for step, _ in store.found()] == [2, 3]


def test_hash_of_a_file_longer_than_a_chunk(tmp_path):
    data = bytes(range(256)) * 5000  # 1.28 MB: more than one read
    (tmp_path / "file").write_bytes(data)
    assert module.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_what_is_beyond_the_run_takes_no_ones_place(store):
    """Whole checkpoints that could not be resumed from, as another version wrote them: the run began anew."""
    for step in (70, 76):
        save(store, step, write)
    for step in (30, 40, 50):
        save(store, step, write)
    assert [step for step, _ in store.found()] == [40, 50, 70, 76]
    assert store.saved(50) == f"checkpoint-50 in {store.checkpoints}"
    save(store, 76, write)
    assert [step for step, _ in store.found()] == [70, 76]


def test_nothing_saved_yet_is_said(store):
    assert store.saved() == "no checkpoint yet"
    with pytest.raises(RunError, match="saved: no checkpoint yet"):
        save(store, 1, lambda folder: (_ for _ in ()).throw(OSError("no space")))
    assert not list(store.staging.iterdir())
