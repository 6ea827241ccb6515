"""Files that are whole or not there, and typed, versioned JSON in them. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from rmoe.errors import RequestError

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding bytes that are no JSON, or JSON of another form, raises: the last for nesting without end."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything written: immutable, and strict about unknown or missing fields when read."""


class Versioned(msgspec.Struct):
    """The one field every file has, read first so that another version is named, not misread."""

    schema_version: int


R = TypeVar("R", bound=Record)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def durable_rename(staged: Path, target: Path, *, synced: bool = False) -> None:
    """Rename a finished file or folder so that a crash leaves all of it under its new name, or none.

    Args:
        staged: on the file system of `target`.
        target: a file that is there is replaced; a folder must be empty or not there.
        synced: its bytes are on disk already.
    """
    if not synced:
        for path in (*(sorted(staged.rglob("*")) if staged.is_dir() else ()), staged):
            sync(path)
    staged.rename(target)
    sync(target.parent)


@contextmanager
def atomic_write(target: Path, *, alone: bool = True) -> Iterator[Path]:
    """Give a path beside `target` to write a file to; a crash leaves the old file or the new one, never a part.

    Args:
        alone: False where several processes may write it at once: each then has a path of its own.
    """
    own = "" if alone else f".{secrets.token_hex(4)}"  # no process number: machines may share a folder
    staged = target.with_name(f"{target.name}{own}.part")
    try:
        yield staged
        durable_rename(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def append_lines(path: Path, lines: bytes) -> None:
    """Append whole lines by one synced write: a kill leaves at most the last line short.

    A line that an earlier kill cut is closed first, or the next would be lost with it.
    """
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                lines = b"\n" + lines
        write_whole(file, lines)
        os.fsync(file.fileno())


def append_records(path: Path, *records: Record) -> None:
    """Append one line of JSON each, by `append_lines`."""
    append_lines(path, b"".join(msgspec.json.encode(record) + b"\n" for record in records))


def write_whole(file: FileIO, data: bytes) -> None:
    """Write at the end of an unbuffered file until all is there; a disk that fills up raises, and keeps none of it."""
    end, left = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while left:  # such a disk takes a part first, without an error
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


class Keyed(Protocol):
    @property
    def key(self) -> Hashable: ...


K = TypeVar("K", bound=Keyed)


def read_lines(path: Path, read: Callable[[bytes, str], K]) -> tuple[list[K], list[str]]:
    """Read a log of one record per line, of which the last line of each key stands.

    Args:
        read: a line and what to call it (`results.jsonl line 3`) to its record; may raise `NOT_JSON`.

    Returns:
        The records, in the order their keys first appeared, and one line for each line that cannot be read.
    """
    found: dict[Hashable, K] = {}
    problems = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        name = f"{path.name} line {number}"
        try:
            record = read(line, name)
        except NOT_JSON as error:
            problems.append(f"{name} cannot be read and is skipped: {error}")
            continue
        found[record.key] = record
    return list(found.values()), problems


def version_of(line: bytes, name: str, lowest: int, newest: int) -> int:
    """The schema version that a line states.

    Raises:
        RequestError: this code does not read it; the line names those it reads.
        DecodeError: it states none.
    """
    found = msgspec.json.decode(line, type=Versioned).schema_version
    if not lowest <= found <= newest:
        allowed = str(newest) if lowest == newest else f"{lowest} to {newest}"
        raise RequestError(f"{name}: schema_version", found, allowed)
    return found


def indented(value: Any) -> bytes:
    """JSON that people read too: one space a level, a line's end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def write_record(path: Path, record: Record) -> None:
    """Write a record as indented JSON, by `atomic_write`."""
    with atomic_write(path) as staged:
        staged.write_bytes(indented(record))


def read_record(path: Path, kind: type[R], version: int) -> R:
    """Read a file written by `write_record`.

    Raises:
        RequestError: the file is absent, of another version, or not such a file.
    """
    try:
        data = path.read_bytes()
        version_of(data, str(path), version, version)
        return msgspec.json.decode(data, type=kind)
    except (OSError, *NOT_JSON) as error:
        raise RequestError(str(path), str(error), f"a {path.name} written by rmoe") from error
