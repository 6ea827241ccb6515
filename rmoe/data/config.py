"""What to read and how to cut it: the data part of a run's configuration. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from rmoe.errors import RequestError
from rmoe.places import expand
from rmoe.validation import AtLeastOne, check_fields

SplitRule = Literal["auto", "enwik8", "wikitext-103", "whole"]
SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class DataConfig:
    """One corpus: text, tokenizer, split.

    Attributes:
        path: a text file, a file of rows (`.jsonl`, `.json`, `.csv`, `.parquet`), a `.gz` of one, a folder of such
            files (of rows only `.jsonl` and `.parquet`), a published archive (`enwik8.zip`,
            `wikitext-103-v1.zip`), or a HuggingFace dataset as `hf:NAME` or `hf:NAME:CONFIG` (NAME may be a folder
            written by `save_to_disk`; needs the extra `data`). None is the Python standard library's own source, or
            with `split` "enwik8" or "wikitext-103" that corpus.
        tokenizer: `bytes`, `words`, the folder of a HuggingFace tokenizer, or `hf:NAME` of one on the Hub.
        split: `auto` takes the splits a HuggingFace dataset comes with, else the first 90 %, next 5 % and last 5 % of
            the bytes, each cut moved on to the next line's start; `enwik8` the first 90, next 5 and last 5 million
            bytes of a text of exactly 100,000,000; `wikitext-103` the published files; `whole` puts all in `test`, for
            measuring only.
        text_field: the field of a row that holds the text.
        max_vocab: words only: keep this many entries, the most frequent; None keeps all.
        min_count: words only: a word seen less often in the training split becomes `<unk>`.
        max_bytes: read only the first so many bytes of the text; None reads all.
        download: fetch a published corpus into the cache when `path` is None.
        cache_dir: where prepared corpora are kept; None is `$RMOE_CACHE`, else `$XDG_CACHE_HOME/rmoe`, else
            `~/.cache/rmoe`.
    """

    path: str | None = None
    tokenizer: str = "bytes"
    split: SplitRule = "auto"
    text_field: str = "text"
    max_vocab: Annotated[int, Meta(ge=4, description="at least 4")] | None = None
    min_count: AtLeastOne = 1
    max_bytes: AtLeastOne | None = None
    download: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "data")
        if self.max_bytes is not None and self.split in ("enwik8", "wikitext-103"):
            raise RequestError(
                "data.max_bytes", self.max_bytes, f"unset with the published split {self.split}"
            )

    def require_read(self, given: Iterable[str]) -> None:
        """Refuse options of a command line that nothing reads here; a stored configuration may have them.

        Raises:
            RequestError: one is among `given`, names of fields.
        """
        words = self.tokenizer == "words"
        published = self.path is None and self.split in ("enwik8", "wikitext-103")
        for name, is_read, allowed in (
            ("max_vocab", words, "unset unless data.tokenizer is words"),
            ("min_count", words, "unset unless data.tokenizer is words"),
            ("download", published, "unset unless data.split is enwik8 or wikitext-103, and without --data"),
        ):
            value = getattr(self, name)
            if name in given and not is_read and value != getattr(type(self), name):  # its default
                raise RequestError(f"data.{name}", value, allowed)

    @property
    def cache_folder(self) -> Path:
        """Where prepared corpora and downloads of this configuration are kept.

        Raises:
            RequestError: no folder is named and there is no home.
        """
        if self.cache_dir is not None:
            return expand(self.cache_dir, "data.cache_dir")
        if os.environ.get("RMOE_CACHE"):
            return expand(os.environ["RMOE_CACHE"], "RMOE_CACHE")
        if os.environ.get("XDG_CACHE_HOME"):
            return expand(os.environ["XDG_CACHE_HOME"], "XDG_CACHE_HOME") / "rmoe"
        try:
            return Path.home() / ".cache" / "rmoe"
        except RuntimeError:
            allowed = "a folder for prepared corpora, since there is no home folder here"
            raise RequestError("RMOE_CACHE", None, allowed) from None

    @property
    def another_cache(self) -> str:
        """How to have another cache: by the setting where it was used, else by what every verb heeds."""
        if self.cache_dir is not None:
            return "give another folder with data.cache_dir (--data.cache-dir)"
        return "set the environment variable RMOE_CACHE to a folder that can be written"
