"""Checkpoint folders that are either whole or not there: staged, synced, renamed, sealed, checked, rotated.

A run keeps its checkpoints in `DIR/checkpoints/checkpoint-<step>`. Each is first written to `DIR/staging/`,
its files are synced to disk, a manifest with the sha256 of every file is added, and one `rename` makes it
visible. So a kill at any moment leaves either the new checkpoint whole or none, and a bit that flips later is
noticed. What the files contain is `rmoe.training.state`'s business; nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from rmoe.errors import RunError, one_line
from rmoe.records import NOT_JSON, Record, durable_rename, indented, sha256, sync
from rmoe.training.run_folder import CHECKPOINTS, checkpoints_of

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


class Seal(Record, frozen=True, kw_only=True):
    """What one file must be."""

    bytes: int
    sha256: str


class CheckpointManifest(Record, frozen=True, kw_only=True):
    """`manifest.json`: the step, the run it belongs to, and every other file of the folder."""

    schema_version: int = MANIFEST_VERSION
    step: int
    run: str  # fingerprint of the run's configuration: a checkpoint moved in from another run is refused
    files: dict[str, Seal]


class SealedManifest(Record, frozen=True, kw_only=True):
    """The manifest with its own sha256, so that a flipped bit in it is noticed too."""

    manifest: CheckpointManifest
    sha256: str


class Damaged(Exception):
    """A checkpoint that must not be used; the text says why, in a phrase."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run.

    Attributes:
        folder: the run's folder, `DIR`.
        run: the run's fingerprint, written into each manifest.
        keep: how many of the newest valid checkpoints rotation leaves; at least 2, which `CheckpointConfig` checks.
        pinned: steps whose checkpoint rotation leaves too.
    """

    folder: Path
    run: str
    keep: int = 2
    pinned: frozenset[int] = frozenset()

    @property
    def checkpoints(self) -> Path:
        """Holds whole checkpoints and nothing else."""
        return self.folder / CHECKPOINTS

    @property
    def staging(self) -> Path:
        """Holds what is being written or deleted; its content is never read."""
        return self.folder / "staging"

    @contextmanager
    def staged(self, step: int) -> Iterator[Path]:
        """A folder to write a checkpoint's plain files into; leaving it seals, publishes and rotates.

        An error inside leaves no checkpoint.

        Args:
            step: optimizer steps done.

        Raises:
            RunError: it could not be written (disk full, for one); earlier checkpoints are untouched.
        """
        target = self.checkpoints / f"checkpoint-{step}"
        staged = self.staging / target.name
        try:
            _remove(staged)
            staged.mkdir(parents=True)
            yield staged
            seal(staged, step, self.run)
            self.checkpoints.mkdir(exist_ok=True)
            self._discard(target)  # one of the same step can only be there if it was found damaged
            durable_rename(staged, target, synced=True)
        except (OSError, SafetensorError) as error:
            _remove(staged)
            raise RunError(
                f"could not save {target.name}: {one_line(str(error))}",
                self.saved(step),
                "free disk space, then --resume",
            ) from error
        self.rotate(step)

    def newest_valid(self, check: Callable[[Path], None] = lambda _: None) -> Path | None:
        """The newest checkpoint that is whole, saying on stderr which were skipped and why.

        Args:
            check: a further look into a folder whose files are as sealed; raises `Damaged` to refuse it.
        """
        for step, path in reversed(self.found()):
            try:
                verify(path, step, self.run)
                check(path)
            except Damaged as reason:
                # One unwrapped line whatever the terminal's width: scripts read it.
                print(one_line(f"skipped {path.name}: {reason}"), file=sys.stderr, flush=True)
            else:
                return path
        return None

    def found(self) -> list[tuple[int, Path]]:
        """(step, path) of everything with a checkpoint's name, whole or not, a folder or not, oldest first."""
        return checkpoints_of(self.folder)

    def rotate(self, newest: int) -> None:
        """Delete checkpoints older than the `keep` newest valid ones.

        Validity is checked by hashing, not assumed: if the newer ones have been damaged, the old one stays.

        Args:
            newest: the step just saved. What is beyond it could not be resumed from, whatever its hashes say, and takes
                no valid one's place.
        """
        valid = 0
        for step, path in reversed(self.found()):
            if step > newest:
                continue
            if valid >= self.keep:
                if step not in self.pinned:
                    self._discard(path)
                continue
            try:
                verify(path, step, self.run)
            except Damaged:
                continue  # left for its owner to look at; it takes no valid one's place
            valid += 1

    def clear_staging(self) -> None:
        """Remove what a killed process left half written or half deleted."""
        _remove(self.staging)

    def saved(self, newest: int | None = None) -> str:
        """What is safe on disk, for an error's text.

        Args:
            newest: the step that the run has come to: what is beyond it could not be resumed from.
        """
        known = [path for step, path in self.found() if newest is None or step <= newest]
        folders = [path for path in known if _is_plain_folder(path)]
        return f"{folders[-1].name} in {self.checkpoints}" if folders else "no checkpoint yet"

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; it leaves `checkpoints/` in one step, so no part of one is ever seen there."""
        if not os.path.lexists(path):
            return
        doomed = self.staging / f"deleted-{path.name}"
        self.staging.mkdir(exist_ok=True)
        _remove(doomed)
        path.rename(doomed)
        _remove(doomed)


def seal(folder: Path, step: int, run: str) -> None:
    """Sync every file of a folder to disk, then add the manifest and sync that."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = Seal(bytes=path.stat().st_size, sha256=sha256(path))
    manifest = CheckpointManifest(step=step, run=run, files=files)
    sealed = SealedManifest(manifest=manifest, sha256=_own_sha256(manifest))
    (folder / MANIFEST).write_bytes(indented(sealed))
    sync(folder / MANIFEST)
    sync(folder)


def verify(folder: Path, step: int, run: str) -> None:
    """Check a folder against its manifest.

    Raises:
        Damaged: a file is missing, added, cut short or changed; or it is another step's or another run's.
    """
    if not _is_plain_folder(folder):
        raise Damaged("not a plain folder")
    try:
        sealed = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=SealedManifest)
    except FileNotFoundError:
        raise Damaged(f"no {MANIFEST}") from None
    except (OSError, *NOT_JSON) as error:
        raise Damaged(f"unreadable {MANIFEST}: {one_line(str(error))}") from None
    manifest = sealed.manifest
    if _own_sha256(manifest) != sealed.sha256:
        raise Damaged(f"sha256 mismatch: {MANIFEST}")
    if manifest.schema_version != MANIFEST_VERSION:
        raise Damaged(f"manifest version {manifest.schema_version}, not {MANIFEST_VERSION}")
    if manifest.step != step:
        raise Damaged(f"its manifest is of step {manifest.step}")
    if manifest.run != run:
        raise Damaged("it belongs to another run")
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(manifest.files.keys() - present):
        raise Damaged(f"missing file: {name}")
    for name in sorted(present - manifest.files.keys()):
        raise Damaged(f"file not in the manifest: {name}")
    for name, expected in sorted(manifest.files.items()):
        path = folder / name  # a plain name: it is one of `present`
        if path.is_symlink() or not path.is_file():
            raise Damaged(f"not a plain file: {name}")
        if path.stat().st_size != expected.bytes:
            raise Damaged(f"size mismatch: {name}")
        try:
            found = sha256(path)
        except OSError as error:
            raise Damaged(f"unreadable {name}: {one_line(str(error))}") from None
        if found != expected.sha256:
            raise Damaged(f"sha256 mismatch: {name}")


def _own_sha256(manifest: CheckpointManifest) -> str:
    return hashlib.sha256(msgspec.json.encode(manifest, order="sorted")).hexdigest()


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
