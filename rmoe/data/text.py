"""Text as a stream of bytes: files, folders, compressed files, JSON lines, the standard library. Imports no torch.

A `Text` can be read more than once, in pieces, and never needs to fit in memory. A single file is taken as it is,
byte for byte; the documents of a folder, a `.jsonl` or a dataset are joined by `SEPARATOR`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rmoe.data.config import SplitName
from rmoe.errors import RequestError
from rmoe.records import NOT_JSON

SEPARATOR = b"\n\n\f\n"
# The files a folder contributes, each also as `.gz`. A file given by its own path may have any suffix.
TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".py", ".tex", ".xml", ".html", ".tokens", ".jsonl"}
)
# A compressed file that unpacks to more is refused: 64 MiB of gzip can hold 64 GiB of nothing.
MAX_UNPACKED_BYTES = 64 * 2**30
# Read as text these would be noise, and nothing would say so.
_NOT_TEXT = frozenset({".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".parquet", ".arrow"})
_CHUNK = 1 << 20
_NOT_OURS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Text:
    """A named stream of bytes; each call of `read` starts it again."""

    name: str
    read: Callable[[], Iterator[bytes]]

    def first(self, limit: int | None) -> Text:
        """This text cut after `limit` bytes; None is all of it."""
        return self if limit is None else Text(f"{self.name}[:{limit}]", lambda: _first(self.read(), limit))


@dataclass(frozen=True)
class SplitTexts:
    """A corpus that comes with its own train, valid and test."""

    name: str
    splits: dict[SplitName, Text]


def open_text(path: str, field: str) -> Text:
    """The text of a file or folder.

    Args:
        path: a file of any suffix, `.gz` and `.jsonl` taken apart, or a folder.
        field: the field of a `.jsonl` line that holds its text.

    Raises:
        RequestError: nothing is there, or a folder holds no text file. Reading may raise it too: a file that is
            unreadable or damaged, an invalid JSON line (named by number).
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return folder_text(place.resolve().name, place, field)
    if not place.is_file():
        raise RequestError("data.path", path, "an existing file or folder")
    if text_suffix(place) in _NOT_TEXT:
        raise RequestError(
            "data.path", path, "text, .gz, .jsonl, a folder of these, or hf:NAME (zip: a published corpus)"
        )
    return Text(place.name, lambda: read_file(place, field))


def standard_library() -> Text:
    """The Python standard library's own source: every `.py` but tests, installed packages and build records.

    It depends on the Python release only: `_sysconfigdata*.py` and `config-*/` describe one machine's build, and some
    distributions leave the tests out.
    """

    def ours(part: str) -> bool:
        return part not in _NOT_OURS and not part.startswith(("config-", "_sysconfigdata"))

    root = Path(sysconfig.get_path("stdlib"))
    return folder_text(f"python-{platform.python_version()}-stdlib", root, "", frozenset({".py"}), ours)


def folder_text(
    name: str,
    root: Path,
    field: str,
    suffixes: frozenset[str] = TEXT_SUFFIXES,
    keep: Callable[[str], bool] = lambda part: True,
) -> Text:
    """All text files below a folder, joined. Links are not followed; names with a leading dot are passed over.

    Files come in the order of the sha256 of their relative paths: fixed, but mixed, so that the last 5 % of the bytes
    are not the last letters of the alphabet.

    Args:
        name: what the text is called.
        root: the folder.
        field: for `.jsonl` files.
        suffixes: of the files taken, each also as `.gz`.
        keep: judges the name of each file and folder below.
    """
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [part for part in subfolders if keep(part) and not part.startswith(".")]
        for file in files:
            place = Path(folder, file)
            if (
                text_suffix(place) in suffixes
                and keep(file)
                and not file.startswith(".")
                and not place.is_symlink()
            ):
                found.append(place.relative_to(root).as_posix())
    if not found:
        kinds = " ".join(sorted(suffixes))
        raise RequestError(
            "data.path", str(root), f"a folder that holds text files ({kinds}, each also as .gz)"
        )
    found.sort(key=lambda relative: hashlib.sha256(os.fsencode(relative)).digest())
    return Text(name, lambda: join(read_file(root / relative, field) for relative in found))


def text_suffix(path: Path) -> str:
    """A file's suffix in lower case; for `.gz` that of the file inside.

    >>> text_suffix(Path("a/B.JSONL.gz"))
    '.jsonl'
    """
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def join(documents: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """Documents, each in pieces, with `SEPARATOR` between them."""
    for number, document in enumerate(documents):
        if number:
            yield SEPARATOR
        yield from document


def read_file(path: Path, field: str) -> Iterator[bytes]:
    """One file's text in pieces: unpacked if `.gz`, its `field`s joined if `.jsonl`."""
    if text_suffix(path) == ".jsonl":
        return join([document] for document in read_documents(path, field))
    return read_bytes(path)


def read_documents(path: Path, field: str) -> Iterator[bytes]:
    """The text of each line of a `.jsonl`; blank lines are passed over.

    Raises:
        RequestError: a line is not a JSON object with a string `field`; it names file and line.
    """
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = decode(line)[field]
            yield text.encode()
        except (*NOT_JSON, KeyError, AttributeError, UnicodeError) as error:
            problem = f"no field {field!r}" if isinstance(error, KeyError) else str(error)
            allowed = f"a JSON object with text in the field {field!r}"
            raise RequestError(f"data.path: {path.name} line {number}", problem, allowed) from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file, unpacked if `.gz`, without their ends and with their numbers from 1."""
    number, rest = 0, b""
    for chunk in read_bytes(path):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, line
    if rest:
        yield number + 1, rest


def read_bytes(path: Path) -> Iterator[bytes]:
    """A file's bytes in pieces, unpacked if `.gz`.

    Raises:
        RequestError: it cannot be read, is not whole, or unpacks to more than `MAX_UNPACKED_BYTES`.
    """
    packed = path.suffix.lower() == ".gz"
    size = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if packed and size > MAX_UNPACKED_BYTES:
                    limit = (
                        f"at most {MAX_UNPACKED_BYTES} bytes when unpacked (unpack it yourself to use more)"
                    )
                    raise RequestError("data.path", str(path), limit)
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        kind = "a whole gzip file" if packed else "a readable file"
        raise RequestError("data.path", str(path), f"{kind} ({error})") from error


def _first(chunks: Iterator[bytes], limit: int) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk[:limit]
        limit -= len(chunk)
        if limit <= 0:
            return
