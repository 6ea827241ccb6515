"""Is a folder the same one on another machine? A token is written here and must be read there. Imports no torch."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rmoe.records import Record


class ReadToken(Record, frozen=True, kw_only=True):
    """Look for a token; gives this machine's name, and whether it saw it."""

    path: str
    token: str

    def carry_out(self) -> tuple[str, bool]:
        try:
            return os.uname().nodename, Path(self.path).read_text() == self.token
        except OSError:
            return os.uname().nodename, False


@contextmanager
def token_in(folder: Path) -> Iterator[ReadToken]:
    """A token in a folder, or in the nearest one above that is there; nothing stays."""
    place = folder.resolve()
    while not place.is_dir():
        place = place.parent
    path, token = place / f".rmoe-shared-{uuid.uuid4().hex}", uuid.uuid4().hex
    path.write_text(token)
    try:
        yield ReadToken(path=str(path), token=token)
    finally:
        path.unlink(missing_ok=True)
