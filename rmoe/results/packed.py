"""Large nested lists in JSON, packed without loss: numbers as compressed typed arrays, rows as columns.

A nested list of many entries is replaced by an object with the key `packed`:

- numbers: `{"packed": dtype, "n": count, "bytes": B}`, where B is base64 of zlib of the little-endian array. With `of`,
  the array holds indices into those values. NaN stands for null.
- texts: `{"packed": "text", "at": indices, "of": [distinct texts]}`.
- rows: `{"packed": "rows", "columns": {name: list}}` for objects that have the same fields.

`lengths` gives the nesting, outermost first: at each level one length that all lists share, or the length of each.
Every list in a packed object may be packed itself. Imports no torch.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

PACKED = "packed"
LEAST_ROWS = 64
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32")
_DTYPES = frozenset({*_INTEGERS, "float32", "float64"})


def pack(value: Any, least: int) -> Any:
    """Pack every nested list of at least `least` entries; `value` is JSON's types, without a key `packed`.

    >>> unpack(pack({"a": [[1, 2], [3]]}, least=1))
    {'a': [[1, 2], [3]]}
    """
    if isinstance(value, dict):
        return {key: pack(item, least) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    lengths, leaves = _flattened(value)
    packed = _packed_leaves(leaves, least) if leaves else None
    if packed is None:
        return [pack(item, least) for item in value]
    if lengths:
        packed["lengths"] = [pack(length, least) for length in lengths]
    return packed


def unpack(value: Any) -> Any:
    """What was packed.

    Raises:
        ValueError: bytes that are not what `pack` writes.
    """
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if PACKED not in value:
        return {key: unpack(item) for key, item in value.items()}
    try:
        leaves = _unpacked_leaves(value)
        for length in reversed(value.get("lengths", [])):
            leaves = _grouped(leaves, unpack(length))
        return leaves
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, zlib.error) as error:
        raise ValueError(f"a packed list that cannot be read: {error!r}") from error


def _flattened(value: list) -> tuple[list[int | list[int]], list]:
    """The lengths of the nested lists, level by level, and what is in the innermost."""
    lengths: list[int | list[int]] = []
    while value and all(isinstance(item, list) for item in value):
        level = [len(item) for item in value]
        lengths.append(level[0] if level[0] and len(set(level)) == 1 else level)
        value = list(chain.from_iterable(value))
    return lengths, value


def _grouped(leaves: list, length: int | list[int]) -> list:
    if isinstance(length, int):
        if len(leaves) % length:
            raise ValueError(f"{len(leaves)} entries in lists of {length}")
        return [leaves[i : i + length] for i in range(0, len(leaves), length)]
    if sum(length) != len(leaves):
        raise ValueError(f"{len(leaves)} entries in lists of {sum(length)}")
    rest = iter(leaves)
    return [list(islice(rest, n)) for n in length]


def _packed_leaves(leaves: list, least: int) -> dict[str, Any] | None:
    """None where they are few, or not all of one kind."""
    kinds = set(map(type, leaves))
    if kinds == {dict}:
        alike = len({tuple(leaf) for leaf in leaves}) == 1
        if not alike or len(leaves) < LEAST_ROWS:
            return None
        return {
            PACKED: "rows",
            "columns": {name: pack([row[name] for row in leaves], least) for name in leaves[0]},
        }
    if len(leaves) < least:
        return None
    if kinds == {str}:
        texts = list(dict.fromkeys(leaves))
        place = {text: index for index, text in enumerate(texts)}
        return {PACKED: "text", "at": pack([place[leaf] for leaf in leaves], least), "of": texts}
    if kinds <= {int}:
        return _packed_integers(leaves)
    if kinds <= {float, int, type(None)} and float in kinds:
        return _packed_floats(leaves)
    return None


def _packed_integers(leaves: list[int]) -> dict[str, Any] | None:
    low, high = min(leaves), max(leaves)
    for dtype in _INTEGERS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return _encoded(np.array(leaves, dtype))
    return None


def _packed_floats(leaves: list) -> dict[str, Any]:
    """The shortest of: double precision; single precision, where it is exact; indices into the distinct values."""
    array = np.array([np.nan if leaf is None else leaf for leaf in leaves], np.float64)
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    exact = np.array_equal(single, array, equal_nan=True)
    found = [_encoded(single if exact else array)]
    distinct, at = np.unique(array, return_inverse=True)
    if len(distinct) <= len(array) // 4:
        indices = _packed_integers(at.reshape(-1).tolist())
        if indices is not None:
            found.append({**indices, "of": _encoded(distinct)})
    return min(found, key=lambda one: len(one["bytes"]) + len(one.get("of", {}).get("bytes", "")))


def _encoded(array: np.ndarray) -> dict[str, Any]:
    raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {
        PACKED: array.dtype.name,
        "n": array.size,
        "bytes": base64.b64encode(zlib.compress(raw, 9)).decode("ascii"),
    }


def _decoded(packed: dict[str, Any]) -> np.ndarray:
    if packed[PACKED] not in _DTYPES:
        raise ValueError(f"a packed list of {packed[PACKED]!r}")
    dtype = np.dtype(packed[PACKED]).newbyteorder("<")
    size = packed["n"] * dtype.itemsize
    # One byte more than is due shows a stream that is too long, without unpacking all of it.
    raw = zlib.decompressobj().decompress(base64.b64decode(packed["bytes"], validate=True), size + 1)
    if len(raw) != size:
        raise ValueError(f"a packed list that is not {packed['n']} entries long")
    return np.frombuffer(raw, dtype)


def _unpacked_leaves(packed: dict[str, Any]) -> list:
    kind = packed[PACKED]
    if kind == "rows":
        columns = {name: unpack(column) for name, column in packed["columns"].items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if kind == "text":
        return _at(packed["of"], unpack(packed["at"]))
    array = _decoded(packed)
    if "of" in packed:
        return _at(_nulls(_decoded(packed["of"])), array.tolist())
    return _nulls(array)


def _nulls(array: np.ndarray) -> list:
    values: list = array.tolist()
    return [None if v != v else v for v in values] if array.dtype.kind == "f" else values


def _at(values: Sequence, indices: list[int]) -> list:
    get: Callable[[int], Any] = values.__getitem__
    if indices and min(indices) < 0:
        raise ValueError("a packed list with an index below 0")
    return list(map(get, indices))
