"""Files that say what they are: typed, versioned JSON, written whole or not at all. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

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


def write_record(path: Path, record: Record) -> None:
    """Write a record as indented JSON; a kill leaves the old file or the new one, never a part."""
    staged = path.with_name(path.name + ".part")
    staged.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    os.replace(staged, path)


def read_record(path: Path, kind: type[R], version: int) -> R:
    """Read a file written by `write_record`.

    Raises:
        RequestError: the file is absent, of another version, or not such a file.
    """
    try:
        data = path.read_bytes()
        found = msgspec.json.decode(data, type=Versioned).schema_version
        if found != version:
            raise RequestError(f"{path}: schema_version", found, str(version))
        return msgspec.json.decode(data, type=kind)
    except (OSError, *NOT_JSON) as error:
        raise RequestError(str(path), str(error), f"a {path.name} written by rmoe") from error
