"""`manifest.json`: what a prepared corpus holds, and its loss unit. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from rmoe.data.config import SplitName
from rmoe.errors import RequestError
from rmoe.records import Record
from rmoe.results.run import Unit

MANIFEST_VERSION = 1


class Source(Record, frozen=True, kw_only=True):
    """The text before it was cut: its name (no folder), size in bytes and sha256."""

    name: str
    bytes: int
    sha256: str


class TokenizerEntry(Record, frozen=True, kw_only=True):
    """`sha256` is over the saved files; `padded_vocab_size` is `vocab_size` up to a multiple of 64."""

    name: str
    sha256: str
    vocab_size: int
    padded_vocab_size: int


class SplitEntry(Record, frozen=True, kw_only=True):
    """One token file. `words` (whitespace-separated, plus one `<eos>` per line) only where perplexity needs it."""

    file: str
    bytes: int
    tokens: int
    words: int | None
    text_sha256: str
    sha256: str


class CorpusManifest(Record, frozen=True, kw_only=True):
    """One corpus. `key` is the cache key: a hash of text, tokenizer and split rule."""

    schema_version: int
    key: str
    source: Source
    split_rule: str
    tokenizer: TokenizerEntry
    dtype: Literal["uint8", "uint16", "uint32"]
    unit: Unit
    splits: dict[str, SplitEntry]

    def require(self, sequence_length: int) -> None:
        """Every split fills a block, or RequestError."""
        for name, entry in self.splits.items():
            if entry.tokens < sequence_length:
                allowed = f"a text whose {name} split has at least sequence_length ({sequence_length}) tokens"
                raise RequestError(
                    "data.path", f"{self.source.name} with {entry.tokens} tokens in {name}", allowed
                )

    def in_unit(self, split: SplitName, loss: float) -> float:
        """Convert a mean loss per token into the unit of this corpus.

        Bits per byte: loss * tokens / bytes / ln 2. Perplexity per word: exp(loss * tokens / words). Tokens, bytes and
        words are those of the whole split, so a split's first token, which nothing predicts, is charged the mean.

        Args:
            split: the split the loss was measured on.
            loss: mean negative log-likelihood per token, nats.
        """
        entry = self.splits[split]
        if self.unit == "bits_per_byte":
            return loss * entry.tokens / entry.bytes / math.log(2)
        if not entry.words:
            raise ValueError(f"{self.source.name}: perplexity, but split {split} counts no words")
        exponent = loss * entry.tokens / entry.words
        return math.exp(exponent) if exponent < 700 else math.inf
