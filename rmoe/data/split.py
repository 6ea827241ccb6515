"""Where a text is cut into train, valid and test. Imports no torch."""

from __future__ import annotations

from itertools import pairwise
from mmap import mmap

from rmoe.data.config import SPLITS, SplitName, SplitRule
from rmoe.data.published import ENWIK8_BYTES, ENWIK8_CUTS
from rmoe.errors import RequestError

Range = tuple[int, int]
# How far a cut may be moved to fall between lines, or else between words.
_REACH = 1 << 16

RULES: dict[SplitRule, str] = {
    "auto": "first 90 %, next 5 %, last 5 % of bytes, each cut moved on to the next line start",
    "enwik8": "first 90,000,000, next 5,000,000, last 5,000,000 bytes",
    "wikitext-103": "as published",
    "whole": "all in test",
}


def cut(text: mmap, rule: SplitRule) -> dict[SplitName, Range]:
    """Byte ranges of the splits of one text.

    Args:
        rule: `auto`, `enwik8` or `whole`.

    Raises:
        RequestError: `enwik8` of a text that has not 100,000,000 bytes.
    """
    size = len(text)
    if rule == "whole":
        return {"test": (0, size)}
    if rule == "enwik8":
        if size != ENWIK8_BYTES:
            raise RequestError(
                "data.split", "enwik8", f"for a text of exactly {ENWIK8_BYTES:,} bytes, not {size:,}"
            )
        cuts = [0, *ENWIK8_CUTS, size]
    else:
        near, far = size * 90 // 100, size * 95 // 100
        first = gap_after(text, near)
        second = max(first, gap_after(text, far))
        if not first < second < size:  # lines longer than a split: each cut stays before the next
            first = gap_after(text, near, max(near, far - 1))
            second = max(first, gap_after(text, far, max(far, size - 1)))
        cuts = [0, first, second, size]
    return {split: (cuts[i], cuts[i + 1]) for i, split in enumerate(SPLITS)}


def gap_after(text: mmap, target: int, stop: int | None = None) -> int:
    """The first line start at or after `target`.

    Where no line ends within 64 KiB, the byte after the next space; where there is none either, the next byte that
    does not continue a UTF-8 character.

    Args:
        stop: the last place for a line or a word to start; None is the text's end. A character may go beyond it.
    """
    stop = len(text) if stop is None else stop
    if target <= 0 or target >= len(text):
        return min(max(target, 0), len(text))
    for gap in (b"\n", b" "):
        found = text.find(gap, target - 1, min(target + _REACH, stop))
        if found >= 0:
            return found + 1
    character_end = min(target + 3, len(text))  # at most three bytes continue a character
    while target < character_end and text[target] & 0xC0 == 0x80:
        target += 1
    return target


def pieces(text: mmap, span: Range) -> list[Range]:
    """A range in pieces of about 64 KiB, each ending with a line (or as `gap_after` says)."""
    start, stop = span
    ends = [start]
    while ends[-1] < stop:
        ends.append(min(gap_after(text, ends[-1] + _REACH, stop), stop))
    return list(pairwise(ends))
