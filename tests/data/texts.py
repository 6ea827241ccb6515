"""A small text and ways to look at what became of it."""

from pathlib import Path

import numpy as np

from rmoe.data import Corpus

LINES = [f"line {number}: some words, é and punctuation.\n" for number in range(400)]
TEXT = "".join(LINES).encode()


def read(corpus: Corpus, split: str) -> bytes:
    """The text of a split, back from its tokens."""
    entry = corpus.manifest.splits[split]
    ids = np.fromfile(corpus.folder / entry.file, dtype=corpus.manifest.dtype)
    return ids.tobytes() if corpus.manifest.dtype == "uint8" else corpus.tokenizer.decode(ids).encode()


def everything(corpus: Corpus) -> bytes:
    """The whole text."""
    return b"".join(read(corpus, split) for split in ("train", "valid", "test"))


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
