"""The cache of prepared corpora: entries appear whole, and are checked whole each time they are used.

An entry is a folder named by a hash of (text, split rule, tokenizer):

    manifest.json   what it holds
    train.bin ...   one file of token ids per split, little-endian uint8, uint16 or uint32
    tokenizer/      as `AutoTokenizer` loads it
    SHA256SUMS      of all of these, in the format of sha256sum

Imports no torch.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmoe.data.manifest import MANIFEST_VERSION, CorpusManifest
from rmoe.records import durable_rename, read_record, sha256

log = logging.getLogger(__name__)
_STAGING = ".staging-"
_ABANDONED_SECONDS = 24 * 3600


def read_entry(entry: Path, key: str) -> CorpusManifest | None:
    """The manifest of an entry that is whole; None if there is none, or, with a warning, if it is damaged."""
    if not entry.is_dir():
        return None
    try:
        return _checked(entry, key)
    except (OSError, ValueError) as error:  # RequestError is a ValueError
        log.warning("corpus cache: %s is damaged (%s); preparing the text again", entry, error)
        return None


@contextmanager
def staging_folder(cache: Path) -> Iterator[Path]:
    """A folder beside the entries, removed at the end if it has not been published.

    What a killed process left is removed a day later.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(f"{_STAGING}*"):
        with suppress(OSError):  # another process may have been quicker
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left)
    staging = cache / f"{_STAGING}{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, entry: Path, key: str) -> None:
    """Put a finished folder in its place.

    If another process has been quicker, its entry (the same bytes) stays: somebody may be about to open it. A damaged
    one is moved away; what is open of it stays readable.
    """
    (staging / "SHA256SUMS").write_text(_checksums(staging))
    if entry.exists():
        with suppress(OSError, ValueError):
            _checked(entry, key)
            return
        with staging_folder(entry.parent) as away, suppress(FileNotFoundError):
            entry.rename(away / "damaged")
    try:
        durable_rename(staging, entry)
    except OSError:
        if not entry.exists():
            raise
        _checked(entry, key)  # lost a race: what stands there must be as good


def _checked(entry: Path, key: str) -> CorpusManifest:
    """The manifest of an entry, or why the entry is not whole."""
    listed, found = (entry / "SHA256SUMS").read_text(), _checksums(entry)
    if listed != found:
        wrong = sorted({line.rpartition("  ")[2] for line in {*listed.splitlines()} ^ {*found.splitlines()}})
        raise ValueError(f"sha256 mismatch: {', '.join(wrong) or 'SHA256SUMS'}")
    manifest = read_record(entry / "manifest.json", CorpusManifest, MANIFEST_VERSION)
    if manifest.key != key:
        raise ValueError("made for another request")
    return manifest


def _checksums(folder: Path) -> str:
    """The content of SHA256SUMS: every other file below the folder, in order."""
    lines: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS"):
        lines.append(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)
