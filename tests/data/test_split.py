"""Cuts: at line starts, exact where published, and nothing lost between them."""

import mmap
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmoe.data.split import cut, gap_after, pieces
from rmoe.errors import RequestError


def mapped(data: bytes) -> mmap.mmap:
    text = mmap.mmap(-1, len(data))
    text[:] = data
    return text


def at_line_starts(data: bytes) -> tuple[int, int]:
    """Where the two cuts fall if each is moved on to the next line's start, by a plain search."""
    return tuple(data.find(b"\n", len(data) * share // 100 - 1) + 1 for share in (90, 95))  # type: ignore[return-value]


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=60))
def test_three_splits_make_the_text_and_begin_lines(lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n"
    ranges = cut(mapped(data), "auto")
    assert b"".join(data[start:stop] for start, stop in ranges.values()) == data
    at_lines = at_line_starts(data)
    if all(start < stop for start, stop in pairwise([0, *at_lines, len(data)])):
        assert [start for start, _ in ranges.values()] == [0, *at_lines]
    elif len(data) >= 100:  # a line longer than a split
        assert all(start < stop for start, stop in ranges.values())
    assert ranges["valid"][0] >= len(data) * 90 // 100
    assert ranges["test"][0] >= len(data) * 95 // 100


@pytest.mark.parametrize(
    "data",
    [
        b"yes word " * 20_000 + b"\n",
        (b"x" * 2047 + b"\n") * 10,
        (b"word " * 300 + b"\n") * 7,
        "é".encode() * 60 + b"\n",
        b"x" * 99 + b"\n",
    ],
)
def test_lines_longer_than_a_split_leave_none_empty(data: bytes) -> None:
    ranges = cut(mapped(data), "auto")
    assert b"".join(data[start:stop] for start, stop in ranges.values()) == data
    for start, stop in ranges.values():
        assert start < stop
        data[start:stop].decode()


@given(
    st.lists(st.sampled_from([b"a" * 70_000, b"b" * 9_000, b"c", b" ", b"\n", b"\xc3\xa9" * 40]), max_size=60)
)
def test_cuts_that_left_no_split_empty_stay(parts: list[bytes]) -> None:
    """Also where the first cut, of a text without lines, is at a word beyond the second's share."""
    data = b"".join([*parts, b"end"])
    text = mapped(data)
    first = gap_after(text, len(data) * 90 // 100)
    second = max(first, gap_after(text, len(data) * 95 // 100))
    if first < second < len(data):
        assert [start for start, _ in cut(text, "auto").values()] == [0, first, second]


def test_shares_of_a_long_text() -> None:
    data = b"0123456789abcde\n" * 1000
    assert cut(mapped(data), "auto") == {"train": (0, 14400), "valid": (14400, 15200), "test": (15200, 16000)}


def test_cut_falls_on_a_target_that_begins_a_line() -> None:
    assert gap_after(mapped(b"ab\ncd\n"), 3) == 3
    assert gap_after(mapped(b"ab\ncd\n"), 2) == 3
    assert gap_after(mapped(b"ab\ncd\n"), 4) == 6


def test_one_long_line_is_cut_at_a_space_else_at_a_character() -> None:
    assert gap_after(mapped(b"x" * 50 + b" " + b"x" * 100_000), 10) == 51
    assert gap_after(mapped("é".encode() * 100_000), 11) == 12
    assert (
        gap_after(mapped(b"\xa9" * 200_000), 11) == 14
    )  # no UTF-8 at all: no character is longer than 4 bytes


def test_whole_is_one_split() -> None:
    assert cut(mapped(b"abc"), "whole") == {"test": (0, 3)}


def test_enwik8_is_exact_and_only_for_its_size() -> None:
    with mmap.mmap(-1, 100_000_000) as text:  # zeros: no line ends to move to
        assert cut(text, "enwik8") == {
            "train": (0, 90_000_000),
            "valid": (90_000_000, 95_000_000),
            "test": (95_000_000, 100_000_000),
        }
    with pytest.raises(RequestError, match=r"exactly 100,000,000 bytes, not 3"):
        cut(mapped(b"abc"), "enwik8")


@given(st.integers(0, 200_000), st.integers(1, 200_000), st.sampled_from([b"\n", b" ", b"x", b"\x80"]))
def test_pieces_make_the_range(start: int, length: int, fill: bytes) -> None:
    text = mapped(fill * (start + length))
    parts = pieces(text, (start, start + length))
    assert parts[0][0] == start
    assert parts[-1][1] == start + length
    assert all(one[1] == other[0] for one, other in pairwise(parts))
    assert all(0 < stop - begin <= 2 * 65536 for begin, stop in parts)
