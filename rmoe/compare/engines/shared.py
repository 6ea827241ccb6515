"""Is a folder the same one on another machine? A token is written here and must be read there. Imports no torch."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sees(path: str, token: str) -> tuple[str, bool]:
    """This machine's name, and whether it reads the token there."""
    try:
        return os.uname().nodename, Path(path).read_text() == token
    except OSError:
        return os.uname().nodename, False


@contextmanager
def token_in(folder: Path) -> Iterator[tuple[str, str]]:
    """What `sees` asks for: a token in a folder, or in the nearest one above that is there; nothing stays."""
    place = folder.resolve()
    while not place.is_dir():
        place = place.parent
    path, token = place / f".rmoe-shared-{uuid.uuid4().hex}", uuid.uuid4().hex
    path.write_text(token)
    try:
        yield str(path), token
    finally:
        path.unlink(missing_ok=True)
