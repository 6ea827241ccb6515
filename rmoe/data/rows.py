"""Rows of a file, whatever its format: JSON lines, a JSON array, csv, parquet. Imports no torch.

The format is told from the suffix (csv, parquet) or the first bytes (parquet, an array). JSON and csv may be `.gz`,
may begin with a byte order mark, may be UTF-16 or UTF-32, and may end their lines as Windows does. JSON lines and csv
are read in pieces and a line may be of any length; a JSON array is read whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rmoe.errors import RequestError
from rmoe.records import NOT_JSON

ROW_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"})
_PARQUET = b"PAR1"
_GZIP = b"\x1f\x8b"  # no UTF-8 text begins with it
_BATCH = 1000
_CHUNK = 1 << 20
# A compressed file that unpacks to more is refused: 64 MiB of gzip can hold 64 GiB of nothing.
MAX_UNPACKED_BYTES = 64 * 2**30


class Row(NamedTuple):
    """One row.

    Attributes:
        where: file and line, for messages.
        values: by column.
        typed: False for csv, whose cells are all text.
    """

    where: str
    values: dict[str, Any]
    typed: bool = True


def text_suffix(path: Path) -> str:
    """A file's suffix in lower case; for `.gz` that of the file inside.

    >>> text_suffix(Path("a/B.JSONL.gz"))
    '.jsonl'
    """
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def has_rows(path: Path) -> bool:
    """Whether a file holds rows rather than one text."""
    return text_suffix(path) in ROW_SUFFIXES or _is_parquet(path)


def read_rows(
    path: Path,
    allowed: str,
    columns: Collection[str] | None = None,
    prefix: str = "",
    field: str = "data.path",
) -> Iterator[Row]:
    """The rows of a file, in order; blank lines are passed over.

    Args:
        path: the file.
        allowed: what a row must be, for messages.
        columns: of parquet, read only these.
        prefix: stands before the file's name in messages.
        field: what named the file, for errors about the whole of it.

    Raises:
        RequestError: the file is missing, unreadable or damaged, or a row is not a table of names and values; it names
            the line.
    """
    name = prefix + path.name
    if _is_parquet(path):
        return _parquet_rows(path, name, columns)
    lines = read_lines(read_bytes(path, field), name)
    if text_suffix(path) in (".csv", ".tsv"):
        return _csv_rows(lines, name, allowed, tabs=text_suffix(path) == ".tsv")
    return _json_rows(lines, name, allowed)


def read_bytes(path: Path, field: str = "data.path") -> Iterator[bytes]:
    """A file's bytes in pieces, unpacked if it is gzip, whatever its name.

    Raises:
        RequestError: it cannot be read, is not whole, or unpacks to more than `MAX_UNPACKED_BYTES`.
    """
    packed = path.suffix.lower() == ".gz" or _begins_with(path, _GZIP)
    size = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if packed and size > MAX_UNPACKED_BYTES:
                    limit = (
                        f"at most {MAX_UNPACKED_BYTES} bytes when unpacked (unpack it yourself to use more)"
                    )
                    raise RequestError(field, str(path), limit)
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        kind = "a whole gzip file" if packed else "a readable file"
        raise RequestError(field, str(path), f"{kind} ({error})") from error


def read_lines(content: Iterable[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Lines of a file as UTF-8, without their ends and with their numbers from 1; of any length, in linear time."""
    number, parts = 0, list[bytes]()
    for chunk in _as_utf8(content, name):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for rest in others:
            number += 1
            yield number, b"".join(parts)
            parts = [rest]
    if last := b"".join(parts):
        yield number + 1, last


def _as_utf8(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """In UTF-8, without a byte order mark. What is damaged in UTF-8 stays as it is: its line will be named."""
    chunks = iter(chunks)
    first = next(chunks, b"")
    encoding = json.detect_encoding(first)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    try:
        for text in codecs.iterdecode(chain([first], chunks), encoding, errors):
            yield text.encode("utf-8", errors)
    except UnicodeError as error:
        raise RequestError(name, f"{encoding.upper()} that is damaged ({error.args[-1]})", "UTF-8") from None


# --- JSON ----------------------------------------------------------------------------------------


def _json_rows(lines: Iterator[tuple[int, bytes]], name: str, allowed: str) -> Iterator[Row]:
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    for kind, number, data in _json_items(lines, name, allowed):
        where = f"{name} {kind} {number}"
        try:
            values = decode(data)
        except NOT_JSON as error:
            raise RequestError(where, str(error), allowed) from None
        yield Row(where, values)


def _json_items(
    lines: Iterator[tuple[int, bytes]], name: str, allowed: str
) -> Iterator[tuple[str, int, bytes | msgspec.Raw]]:
    """Each line, or each item of the one array that all lines make."""
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        if text.startswith(b"["):
            # What follows the bracket tells an array of objects from a line that is wrong.
            while text == b"[" and (following := next(lines, None)) is not None:
                text += following[1].strip()
            if text[1:].lstrip()[:1] in (b"{", b"]"):
                whole = b"\n".join([text, *(rest for _, rest in lines)])
                try:
                    items = msgspec.json.decode(whole, type=list[msgspec.Raw])
                except NOT_JSON as error:
                    raise RequestError(name, str(error), f"a JSON array of {allowed}") from None
                yield from (("item", index, item) for index, item in enumerate(items, start=1))
                return
        yield "line", number, line
        yield from (("line", number, line) for number, line in lines if line.strip())


# --- csv -----------------------------------------------------------------------------------------


def _csv_rows(lines: Iterator[tuple[int, bytes]], name: str, allowed: str, tabs: bool) -> Iterator[Row]:
    header: list[str] | None = None
    texts = _decoded(lines, name)
    blank, first = next((pair for pair in enumerate(texts) if pair[1].strip()), (0, ""))
    mark = "\t" if tabs else max(",;\t", key=first.count)

    def rest() -> Iterator[str]:
        yield first
        yield from texts

    reader = csv.reader(rest(), delimiter=mark, strict=True)
    try:
        with _long_cells():
            for cells in reader:
                if header is None:
                    header = [cell.strip() for cell in cells]
                    continue
                if not cells:
                    continue
                where = f"{name} line {blank + reader.line_num}"
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells under {len(header)} columns ({', '.join(header)})"
                    raise RequestError(where, problem, allowed)
                yield Row(where, dict(zip(header, cells, strict=True)), typed=False)
    except csv.Error as error:
        raise RequestError(f"{name} line {blank + reader.line_num}", str(error), f"csv: {allowed}") from None


def _decoded(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[str]:
    for number, line in lines:
        try:
            yield line.decode() + "\n"
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
            raise RequestError(f"{name} line {number}", problem, "csv saved as UTF-8") from None


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's limit of 128 KiB for a cell, out of the way."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- parquet -------------------------------------------------------------------------------------


def _is_parquet(path: Path) -> bool:
    if text_suffix(path) == ".parquet":
        return True
    return _begins_with(path, _PARQUET)


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False  # said where it is read


def _parquet_rows(path: Path, name: str, columns: Collection[str] | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise RequestError(
            name, str(path), "JSON lines, csv, or parquet with the extra `data`: pip install 'rmoe[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [each for each in names if each in columns]
            if wanted == []:
                raise RequestError(
                    name, f"columns {', '.join(names)}", f"parquet with {', '.join(columns or ())}"
                )
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{name} row {number}", values)
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(name, str(path), f"a whole parquet file ({error})") from None
