"""From a request to token files: read, cut, encode, and keep. Imports no torch.

The text is read twice: once to hash it, which names its entry in the cache, and again only if there is no such entry.
So nothing is written before all of a text is known to be readable, and a file that has changed is another corpus.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from rmoe.data.cache import publish, read_entry, staging_folder
from rmoe.data.config import SPLITS, DataConfig
from rmoe.data.corpus import Corpus
from rmoe.data.encode import (
    Encoder,
    TokenizerChoice,
    decoded,
    folder_sha256,
    padded,
    vocabulary_size,
    words,
)
from rmoe.data.hub import PREFIX, open_dataset
from rmoe.data.manifest import MANIFEST_VERSION, CorpusManifest, Source, SplitEntry, TokenizerEntry
from rmoe.data.published import enwik8_text, wikitext103_texts
from rmoe.data.split import RULES, Range, cut, pieces
from rmoe.data.text import SplitTexts, Text, open_text, standard_library
from rmoe.errors import RequestError, RunError
from rmoe.records import write_record
from rmoe.results.run import Unit


def prepare(config: DataConfig, sequence_length: int) -> Corpus:
    """The corpus of a request, from the cache when it is there.

    Args:
        sequence_length: tokens per block, at least 2. It does not change the token files.

    Raises:
        RequestError: the text is missing, unreadable, damaged, empty or shorter than one block in some split; the
            tokenizer cannot be loaded or does not take this text; nothing is written then.
        RunError: the cache cannot be written.
    """
    if sequence_length < 2:
        raise RequestError("sequence_length", sequence_length, "at least 2")
    choice = TokenizerChoice(config)
    text = open_source(config)
    source, sizes = measure(text)
    key = _key(config, choice, source, sizes)
    entry = config.cache_folder / "corpora" / key[:32]
    manifest = read_entry(entry, key)
    if manifest is not None:
        manifest.require(sequence_length)
    else:
        try:
            with staging_folder(entry.parent) as staging:
                manifest = encode_into(staging, key, config, text, source, choice)
                manifest.require(sequence_length)
                write_record(staging / "manifest.json", manifest)
                publish(staging, entry, key)
        except OSError as error:
            what = f"the corpus cache {entry.parent} cannot be written ({error})"
            raise RunError(what, "nothing", config.another_cache) from error
    # The same text under another name is the same entry, but goes by the name it was asked for.
    return Corpus(entry, msgspec.structs.replace(manifest, source=source), sequence_length)


def corpus_key(config: DataConfig) -> str:
    """The identity of a request's corpus, by the content of its text and tokenizer; nothing is written.

    Raises:
        RequestError: as `prepare`.
    """
    source, sizes = measure(open_source(config))
    return _key(config, TokenizerChoice(config), source, sizes)


def _key(config: DataConfig, choice: TokenizerChoice, source: Source, sizes: list[int]) -> str:
    request = [MANIFEST_VERSION, source.sha256, sizes, config.split, choice.key]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def open_source(config: DataConfig) -> Text | SplitTexts:
    """What `config.path` and `config.split` name, not read yet."""
    text: Text | SplitTexts
    if config.split == "enwik8":
        return enwik8_text(config)
    if config.split == "wikitext-103":
        return wikitext103_texts(config)
    if config.path is None:
        text = standard_library()
    elif config.path.startswith(PREFIX):
        text = open_dataset(config.path, config.text_field, whole=config.split == "whole")
    else:
        text = open_text(config.path, config.text_field)
    if isinstance(text, Text):
        return text.first(config.max_bytes, characters=config.tokenizer != "bytes")
    if config.max_bytes is not None:
        raise RequestError("data.max_bytes", config.max_bytes, "unset with a dataset that has its own splits")
    return text


def measure(text: Text | SplitTexts, copy: BinaryIO | None = None) -> tuple[Source, list[int]]:
    """Read all of a text once: its name, size and sha256, and the sizes of the parts it comes in.

    Args:
        copy: gets the text, one part after another.

    Raises:
        RequestError: it cannot be read, or a part of it is empty and not to be copied.
    """
    digest, sizes = hashlib.sha256(), []
    for part in parts(text):
        sizes.append(0)
        for chunk in part.read():
            digest.update(chunk)
            sizes[-1] += len(chunk)
            if copy is not None:
                copy.write(chunk)
        if copy is None and not sizes[-1]:
            raise RequestError("data.path", part.name, "a text that is not empty")
    return Source(name=text.name, bytes=sum(sizes), sha256=digest.hexdigest()), sizes


def parts(text: Text | SplitTexts) -> list[Text]:
    """The one text, or train, valid and test in this order."""
    return [text] if isinstance(text, Text) else [text.splits[split] for split in SPLITS]


def encode_into(
    folder: Path,
    key: str,
    config: DataConfig,
    text: Text | SplitTexts,
    source: Source,
    choice: TokenizerChoice,
) -> CorpusManifest:
    """Write the token files and the tokenizer of a text into a folder."""
    raw = folder / "text"
    with raw.open("wb") as copy:
        found, sizes = measure(text, copy)
    if found != source:
        raise RunError(f"{source.name} changed while it was read", "nothing", "run again")
    ranges = dict(zip(SPLITS, pairwise(accumulate(sizes, initial=0)), strict=False))
    with raw.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if isinstance(text, Text):
            ranges = cut(data, config.split)
        encoder = choice.fit(data, ranges.get("train"))
        dtype = smallest_dtype(encoder.num_ids)
        unit: Unit = (
            "perplexity" if encoder.counts_words or config.split == "wikitext-103" else "bits_per_byte"
        )
        count = unit == "perplexity"
        splits = {
            name: write_split(folder / f"{name}.bin", data, span, encoder, dtype, count)
            for name, span in ranges.items()
        }
    raw.unlink()
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    vocab_size = vocabulary_size(encoder.tokenizer)
    return CorpusManifest(
        schema_version=MANIFEST_VERSION,
        key=key,
        source=source,
        split_rule=RULES[config.split] if isinstance(text, Text) else RULES["wikitext-103"],
        tokenizer=TokenizerEntry(
            name=encoder.name,
            sha256=folder_sha256(folder / "tokenizer"),
            vocab_size=vocab_size,
            padded_vocab_size=padded(vocab_size),
        ),
        dtype=dtype,
        unit=unit,
        splits={str(name): split for name, split in splits.items()},
    )


def smallest_dtype(num_ids: int) -> Literal["uint8", "uint16", "uint32"]:
    """The smallest unsigned type that holds ids below `num_ids`."""
    return "uint8" if num_ids <= 2**8 else "uint16" if num_ids <= 2**16 else "uint32"


def write_split(
    path: Path, text: mmap.mmap, span: Range, encoder: Encoder, dtype: str, count_words: bool
) -> SplitEntry:
    """Encode one split into a token file; a word vocabulary's tokens are its words."""
    text_digest, digest, tokens = hashlib.sha256(), hashlib.sha256(), 0
    little_endian = np.dtype(dtype).newbyteorder("<")
    with path.open("wb") as file:
        for ids in encoder.encode(text, span):
            data = ids.astype(little_endian).tobytes()
            digest.update(data)
            file.write(data)
            tokens += len(ids)
    for start, stop in pieces(text, span):
        text_digest.update(text[start:stop])
    num_words = None
    if count_words:
        num_words = (
            tokens
            if encoder.counts_words
            else sum(len(words(piece)) for piece in decoded(text, span, "words"))
        )
    return SplitEntry(
        file=path.name,
        bytes=span[1] - span[0],
        tokens=tokens,
        words=num_words,
        text_sha256=text_digest.hexdigest(),
        sha256=digest.hexdigest(),
    )
