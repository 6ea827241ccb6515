"""Text as a stream of bytes: files, folders, compressed files, rows with a text, the standard library.

A `Text` can be read more than once, in pieces, and never needs to fit in memory. A single file is taken as it is,
byte for byte; the documents of a folder, of a file of rows (JSON, csv, parquet) or of a dataset are joined by
`SEPARATOR`. Imports no torch.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rmoe.data.config import SplitName
from rmoe.data.rows import has_rows, read_bytes, read_rows, text_suffix
from rmoe.errors import RequestError
from rmoe.places import expand

SEPARATOR = b"\n\n\f\n"
# The files a folder contributes, each but parquet also as `.gz`. A file given by its own path may have any suffix.
# Not .json and .csv, of which many a folder has some that are not its text.
TEXT_SUFFIXES = frozenset(
    {
        ".txt", ".text", ".md", ".rst", ".py", ".tex", ".xml", ".html", ".tokens", ".jsonl", ".ndjson", ".parquet",
    }
)  # fmt: skip
# Read as text these would be noise, and nothing would say so.
_NOT_TEXT = frozenset({".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".arrow"})
_NOT_OURS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Text:
    """A named stream of bytes; each call of `read` starts it again."""

    name: str
    read: Callable[[], Iterator[bytes]]

    def first(self, limit: int | None, characters: bool = False) -> Text:
        """This text cut after `limit` bytes, or before the character cut there; None is all of it."""
        if limit is None:
            return self
        return Text(f"{self.name}[:{limit}]", lambda: _first(self.read(), limit, characters))


@dataclass(frozen=True)
class SplitTexts:
    """A corpus that comes with its own train, valid and test."""

    name: str
    splits: dict[SplitName, Text]


def open_text(path: str, field: str) -> Text:
    """The text of a file or folder.

    Args:
        path: a file of any suffix, `.gz` and files of rows taken apart, or a folder.
        field: the field of a row that holds its text.

    Raises:
        RequestError: nothing is there, or a folder holds no text file. Reading may raise it too: a file that is
            unreadable or damaged, an invalid JSON line (named by number).
    """
    place = expand(path, "data.path")
    if place.is_dir():
        return folder_text(place.resolve().name, place, field)
    if not place.is_file():
        raise RequestError("data.path", path, "an existing file or folder")
    if text_suffix(place) in _NOT_TEXT:
        raise RequestError(
            "data.path",
            path,
            "text, .gz, .jsonl, .json, .csv, .parquet, a folder of these, or hf:NAME (zip: a published corpus)",
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
    """All text files below a folder, joined; names with a leading dot are passed over.

    Links count as what they lead to, so a folder of links (the Hub's cache) is the text of its files; a link to what
    the folder itself already contributes adds nothing, and a file in a linked folder counts once, however many links
    lead there. What is no file (a pipe) is passed over. A document's byte order mark is left out. Files come in the
    order of the sha256 of their relative paths: fixed, but mixed, so that the last 5 % of the bytes are not the last
    letters of the alphabet.

    Args:
        name: what the text is called.
        root: the folder.
        field: for files of rows.
        suffixes: of the files taken, each also as `.gz`.
        keep: decides by the name of each file and folder below.

    Raises:
        RequestError: there is no such file, or a link leads nowhere.
    """
    files = _files_below(root, (root.resolve(),), lambda part: keep(part) and not part.startswith("."))
    named = sorted(file.relative_to(root).as_posix() for file in files if text_suffix(file) in suffixes)
    for relative in named:
        if not (root / relative).exists():
            raise RequestError("data.path", str(root / relative), "a link that leads to a file")
    named = [relative for relative in named if (root / relative).is_file()]
    named.sort(key=lambda relative: (root / relative).is_symlink())  # a link adds nothing to what it leads to
    whole, real = root.resolve(), {relative: (root / relative).resolve() for relative in named}
    counted = {target for relative, target in real.items() if target == whole / relative}
    found = []
    for relative, target in real.items():
        if target == whole / relative or target not in counted:
            found.append(relative)
            if not (root / relative).is_symlink():
                counted.add(target)
    if not found:
        kinds = " ".join(sorted(suffixes))
        raise RequestError(
            "data.path", str(root), f"a folder that holds text files ({kinds}, each also as .gz)"
        )
    found.sort(key=lambda relative: hashlib.sha256(os.fsencode(relative)).digest())
    return Text(name, lambda: join(_unmarked(read_file(root / relative, field)) for relative in found))


def _files_below(folder: Path, above: tuple[Path, ...], keep: Callable[[str], bool]) -> Iterator[Path]:
    """Files and links to files; a link to a folder is followed unless that holds, or lies in, one `above` it."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise RequestError("data.path", str(folder), f"a readable folder ({error})") from None
    for entry in entries:
        if not keep(entry.name):
            continue
        place = Path(entry.path)
        if not os.path.isdir(place):  # a link that leads to itself is none
            yield place
            continue
        target = place.resolve()
        within = any(target == one or one in target.parents or target in one.parents for one in above)
        if not entry.is_symlink() or not within:
            yield from _files_below(place, (*above, target), keep)


def _unmarked(document: Iterable[bytes]) -> Iterator[bytes]:
    """Without a byte order mark, which joined documents would have in the middle of their text."""
    for number, chunk in enumerate(document):
        yield chunk if number else chunk.removeprefix(codecs.BOM_UTF8)


def join(documents: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    """Documents, each in pieces, with `SEPARATOR` between them."""
    for number, document in enumerate(documents):
        if number:
            yield SEPARATOR
        yield from document


def read_file(path: Path, field: str) -> Iterator[bytes]:
    """One file's text in pieces: unpacked if `.gz`, its `field`s joined if it has rows.

    Raises:
        RequestError: it cannot be read, or is UTF-16 or UTF-32, whose bytes are no text to any tokenizer here.
    """
    if has_rows(path):
        return join([document] for document in read_documents(path, field))
    return _plain(path)


def _plain(path: Path) -> Iterator[bytes]:
    for number, chunk in enumerate(read_bytes(path)):
        if number == 0:
            encoding = json.detect_encoding(chunk[:4]).upper()
            if encoding in ("UTF-16", "UTF-32"):  # by its byte order mark
                said = f"UTF-8 (this file begins as {encoding}: iconv -f {encoding} -t UTF-8)"
                raise RequestError("data.path", str(path), said)
        yield chunk


def read_documents(path: Path, field: str) -> Iterator[bytes]:
    """The text of each row of a file.

    Raises:
        RequestError: a row has no text in `field`; it names file and line.
    """
    allowed = f"a JSON object with text in the field {field!r}"
    for row in read_rows(path, allowed, {field}, "data.path: "):
        text = row.values.get(field)
        if not isinstance(text, str):
            columns = "" if row.typed else f"; columns {', '.join(row.values)}"
            problem = f"{field}: {text!r:.80}" if field in row.values else f"no field {field!r}{columns}"
            raise RequestError(row.where, problem, allowed)
        try:
            yield text.encode()
        except UnicodeError as error:
            raise RequestError(row.where, str(error), allowed) from None


def _first(chunks: Iterator[bytes], limit: int, characters: bool) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # holds back half a character
    for chunk in chunks:
        kept = chunk[:limit]
        yield decoder.decode(kept).encode("utf-8", "surrogateescape") if characters else kept
        limit -= len(kept)
        if not limit:
            return
    yield decoder.getstate()[0]
