"""From text to token ids: bytes, words with a vocabulary cut, or any HuggingFace tokenizer.

Each encoder is a transformers tokenizer, saved beside a model and loaded by `AutoTokenizer`, and a way to encode a
corpus that gives the same ids faster. transformers is imported when a tokenizer is made; torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmoe.data.config import DataConfig
from rmoe.data.split import Range, pieces
from rmoe.errors import RequestError
from rmoe.places import display_name, model_place

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
_PIECES_PER_BATCH = 64


class ByteEncoder:
    """Id = byte value, any bytes at all."""

    name, num_ids, counts_words = "bytes", 256, False

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()

    def encode(self, text: mmap, span: Range) -> Iterator[NDArray[np.unsignedinteger]]:
        for start, stop in pieces(text, span):
            yield np.frombuffer(text[start:stop], dtype=np.uint8)


class WordEncoder:
    """Whitespace-separated words and `<eos>` for each line end; words outside the vocabulary are `<unk>`."""

    name, counts_words = "words", True

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.tokenizer = word_tokenizer(vocabulary)
        self.num_ids = max(vocabulary.values()) + 1
        self.ids = _Known(vocabulary)

    def encode(self, text: mmap, span: Range) -> Iterator[NDArray[np.unsignedinteger]]:
        for piece in decoded(text, span, "words"):
            found = words(piece)
            yield np.fromiter(map(self.ids.__getitem__, found), dtype=np.uint32, count=len(found))


class HubEncoder:
    """Any HuggingFace tokenizer, without special tokens of its own.

    Text is encoded in pieces of about 64 KiB that end with a line. Special tokens written out in the text are encoded
    as text.
    """

    counts_words = False

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.num_ids = max(tokenizer.get_vocab().values()) + 1

    def encode(self, text: mmap, span: Range) -> Iterator[NDArray[np.unsignedinteger]]:
        batch: list[str] = []
        for piece in decoded(text, span, self.name):
            batch.append(piece)
            if len(batch) == _PIECES_PER_BATCH:
                yield self._encode(batch)
                batch = []
        if batch:
            yield self._encode(batch)

    def _encode(self, batch: list[str]) -> NDArray[np.unsignedinteger]:
        encoded = self.tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=True,
            verbose=False,
        )["input_ids"]
        return np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in encoded])


Encoder = ByteEncoder | WordEncoder | HubEncoder
"""A tokenizer of transformers, and `encode`: the ids of a range of the text, in parts.

Ids are below `num_ids`, which sets the token file's dtype; where a token `counts_words`, perplexity is per word.
"""


class _Known(dict[str, int]):
    def __missing__(self, word: str) -> int:
        return self[UNKNOWN]


def vocabulary_size(tokenizer: Any) -> int:
    """Ids of a tokenizer, its special tokens among them."""
    return int(max(tokenizer.get_vocab().values())) + 1


def padded(vocab_size: int) -> int:
    """Rows of a model's embedding for so many ids: a multiple of 64.

    >>> padded(258)
    320
    """
    return -(-vocab_size // 64) * 64


def byte_tokenizer() -> Any:
    """A byte-level BPE without merges whose ids are byte values; 256 and 257 are `<|endoftext|>` and `<|pad|>`.

    Not ByT5's, which appends `</s>` to every context and drops invalid UTF-8. No text encodes to an id above 255:
    special tokens written out in a text are bytes like any other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def word_tokenizer(vocabulary: dict[str, int]) -> Any:
    """WikiText's tokens: whitespace separates words, each line end is `<eos>`, unknown words are `<unk>`.

    Args:
        vocabulary: word -> id; holds `<unk>`, `<eos>` and `<|pad|>`.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    # Python counts U+001C to U+001F as whitespace, Unicode's White_Space does not.
    separators = normalizers.Replace(Regex(r"[\x1c-\x1f]"), " ")
    tokenizer.normalizer = normalizers.Sequence([separators, normalizers.Replace("\n", f" {END_OF_LINE} ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token=END_OF_LINE,
        pad_token=PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def words(text: str) -> list[str]:
    """Whitespace-separated words, `<eos>` for each line end.

    >>> words("a  b\\n\\nc")
    ['a', 'b', '<eos>', '<eos>', 'c']
    """
    return text.replace("\n", f" {END_OF_LINE} ").split()


def build_vocabulary(texts: Iterable[str], max_vocab: int | None, min_count: int) -> dict[str, int]:
    """Word -> id: `<unk>`, `<eos>`, `<|pad|>`, then words by falling count, equal counts in code-point order.

    Args:
        texts: of the training split, in pieces.
        max_vocab: entries kept, the three above among them; None keeps all.
        min_count: words seen less often are left out.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words(text))
    special = (UNKNOWN, END_OF_LINE, PAD)
    for word in special:
        del counts[word]
    kept = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    return {word: number for number, word in enumerate([*special, *kept][:max_vocab])}


def decoded(text: mmap, span: Range, tokenizer: str) -> Iterator[str]:
    """A range of the text in pieces, as strings.

    Raises:
        RequestError: it is not UTF-8.
    """
    for start, stop in pieces(text, span):
        try:
            yield text[start:stop].decode()
        except UnicodeDecodeError as error:
            where = f"text with the byte 0x{error.object[error.start]:02x} at offset {start + error.start}"
            allowed = f"UTF-8 with the tokenizer {tokenizer} (the tokenizer bytes takes any text)"
            raise RequestError("data.path", where, allowed) from error


class TokenizerChoice:
    """The tokenizer of a request, before the text has been seen.

    Raises:
        RequestError: the tokenizer cannot be loaded, or a word vocabulary is asked for without a training split.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.encoder: Encoder | None = None
        if config.tokenizer == "words":
            if config.split == "whole":
                allowed = (
                    "the folder of a saved tokenizer when the split is whole (words are counted in train)"
                )
                raise RequestError("data.tokenizer", "words", allowed)
            self.key = f"words max_vocab={config.max_vocab} min_count={config.min_count}"
        else:
            self.encoder = ByteEncoder() if config.tokenizer == "bytes" else load_encoder(config.tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                self.encoder.tokenizer.save_pretrained(folder)
                self.key = folder_sha256(Path(folder))

    def fit(self, text: mmap, train: Range | None) -> Encoder:
        """The encoder; a word vocabulary is counted over the training split."""
        if self.encoder is None:
            assert train is not None
            texts = decoded(text, train, "words")
            self.encoder = WordEncoder(build_vocabulary(texts, self.config.max_vocab, self.config.min_count))
        return self.encoder


def load_encoder(name: str) -> Encoder:
    """A saved or published tokenizer; one that `rmoe` made is known again, and then encodes as fast as it did."""
    from transformers import AutoTokenizer

    kinds = "bytes, words, or the folder of a HuggingFace tokenizer"
    try:
        folder = model_place(name, "data.tokenizer")
    except RequestError as error:
        raise RequestError("data.tokenizer", name, f"{kinds}: {error.allowed}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each file format has its own family of errors
        raise RequestError("data.tokenizer", name, f"{kinds} ({error})") from error
    if _alike(tokenizer, byte_tokenizer(), "model", "normalizer", "pre_tokenizer"):
        return _with_additions(ByteEncoder(), tokenizer)
    special = {UNKNOWN: 0, END_OF_LINE: 1, PAD: 2}
    if _alike(tokenizer, word_tokenizer(special), "normalizer", "pre_tokenizer"):
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
        if special.items() <= vocabulary.items():
            return _with_additions(WordEncoder(vocabulary), tokenizer)
    return HubEncoder(display_name(folder), tokenizer)


def _with_additions(encoder: ByteEncoder | WordEncoder, tokenizer: Any) -> Encoder:
    """The encoder with a tokenizer that its user gave a chat template or tokens, which no text encodes to."""
    added = tokenizer.get_added_vocab() != encoder.tokenizer.get_added_vocab()
    if added or tokenizer.chat_template is not None:
        encoder.tokenizer = tokenizer
    return encoder


def _alike(one: Any, other: Any, *parts: str) -> bool:
    """Whether two tokenizers have the same stages."""
    if not hasattr(one, "backend_tokenizer"):
        return False
    mine, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    return all(mine[part] == theirs[part] for part in parts)


def folder_sha256(folder: Path) -> str:
    """One hash over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
