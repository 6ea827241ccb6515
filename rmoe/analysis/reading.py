"""The text a model is analysed on: its own tokenizer, whole blocks, and how its tokens are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from rmoe.analysis.options import TextOptions
from rmoe.analysis.token_text import TokenText
from rmoe.data import DataConfig, prepare
from rmoe.errors import RequestError
from rmoe.places import tokenizer_place
from rmoe.results.analysis import TextInfo

_MAX_BYTES_PER_TOKEN = 16  # of text read per token wanted: a tokenizer that needs more gives fewer tokens


@dataclass(frozen=True)
class Reading:
    """One text as one model reads it.

    Attributes:
        blocks: [N, S] token ids, consecutive text.
        text: name, hash and number of tokens, for the file.
        token_text: how an id is shown.
        note: what was decided for the reader, None if nothing.
    """

    blocks: np.ndarray
    text: TextInfo
    token_text: Callable[[int], str]
    note: str | None


def choose_tokenizer(model: str, vocab_size: int) -> tuple[str, str | None]:
    """The tokenizer saved with a model; bytes for a folder without one. It is never guessed from the model's type.

    A checkpoint of a run has none of its own: its tokenizer is that of the run's `model/`.

    Args:
        model: its folder.
        vocab_size: rows of the model's embedding.

    Returns:
        What `DataConfig.tokenizer` takes, and a note when bytes were chosen.

    Raises:
        RequestError: a folder without tokenizer files whose model cannot read bytes.
    """
    folder = Path(model)
    if (place := tokenizer_place(folder)) is not None:
        return str(place), None
    if vocab_size < 256:
        allowed = f"a folder with tokenizer files, or a vocabulary of at least 256 read as bytes (it has {vocab_size})"
        raise RequestError("MODEL", model, allowed)
    return "bytes", f"{folder.name} has no tokenizer files: the text is read as bytes"


def read_text(folder: Path, model: PreTrainedModel, text: TextOptions, sequence_length: int) -> Reading:
    """Read the first tokens of a text, cut to whole blocks, with the model's tokenizer.

    Args:
        folder: the model's.
        model: what was loaded from it; its embedding's rows limit the ids.
        text: without a split all of a text that was named, and the test split of the standard library.
        sequence_length: S.

    Raises:
        RequestError: no tokenizer, one that does not fit the model, or a text shorter than a block.
    """
    if text.tokens < sequence_length:
        allowed = f"at least one block, --sequence-length ({sequence_length})"
        raise RequestError("--tokens", text.tokens, allowed)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    tokenizer, note = choose_tokenizer(str(folder), vocab_size)
    split = text.split or ("whole" if text.data is not None else "test")
    whole = split == "whole"
    corpus = prepare(
        DataConfig(
            path=text.data,
            tokenizer=tokenizer,
            split="whole" if whole else "auto",
            max_bytes=text.tokens * _MAX_BYTES_PER_TOKEN if whole else None,
        ),
        sequence_length,
    )
    ids = corpus.blocks("test" if split == "whole" else split).tokens
    count = min(len(ids), text.tokens) // sequence_length
    blocks = np.array(ids[: count * sequence_length]).reshape(count, sequence_length)
    needed = 256 if corpus.manifest.tokenizer.name == "bytes" else corpus.manifest.tokenizer.vocab_size
    if needed > vocab_size:
        allowed = f"one with at most as many entries as the model's vocabulary ({vocab_size})"
        raise RequestError("tokenizer", f"{tokenizer} with {needed} entries", allowed)
    source = corpus.manifest.source
    info = TextInfo(name=source.name, sha256=source.sha256, tokens=blocks.size)
    return Reading(blocks, info, TokenText(corpus.tokenizer), note)
