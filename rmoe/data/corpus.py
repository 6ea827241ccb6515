"""A prepared corpus: token files on disk, what they hold, and blocks of them. Built by `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmoe.data.config import SplitName
from rmoe.data.manifest import CorpusManifest
from rmoe.errors import RequestError
from rmoe.results.run import Unit

if TYPE_CHECKING:
    from rmoe.data.blocks import BlockDataset


@dataclass(frozen=True)
class Corpus:
    """Tokens, tokenizer and counts of one text.

    Attributes:
        folder: the cache entry; read only.
        manifest: what it holds.
        sequence_length: tokens per block.
    """

    folder: Path
    manifest: CorpusManifest
    sequence_length: int

    def blocks(self, split: SplitName, overlap: int = 1) -> BlockDataset:
        """The blocks of a split: of `train` the full ones, of `valid` and `test` every token.

        Args:
            split: a split this corpus has.
            overlap: tokens each block repeats from the one before as context; 1 is none but the token from which the
                first target is predicted.

        Raises:
            RequestError: there is no such split (`data.split` was `whole`).
        """
        from rmoe.data.blocks import BlockDataset

        if split not in self.manifest.splits:
            raise RequestError(
                "split", split, f"one of {', '.join(self.manifest.splits)} (data.split decides)"
            )
        file = self.folder / self.manifest.splits[split].file
        return BlockDataset(
            file, self.manifest.dtype, self.sequence_length, overlap=overlap, whole=split != "train"
        )

    @property
    def train(self) -> BlockDataset:
        """Full blocks of the training split."""
        return self.blocks("train")

    @property
    def valid(self) -> BlockDataset:
        """The whole validation split."""
        return self.blocks("valid")

    @property
    def test(self) -> BlockDataset:
        """The whole test split."""
        return self.blocks("test")

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; `save_pretrained` puts it beside a model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False)

    @property
    def vocab_size(self) -> int:
        """Rows of a model's embedding: the tokenizer's entries up to a multiple of 64."""
        return self.manifest.tokenizer.padded_vocab_size

    @property
    def unit(self) -> Unit:
        """`bits_per_byte`, or `perplexity` (per word) for a word vocabulary and for WikiText-103."""
        return self.manifest.unit

    def in_unit(self, split: SplitName, loss: float) -> float:
        """A split's mean loss per token (nats) in the corpus's unit; see `CorpusManifest.in_unit`."""
        return self.manifest.in_unit(split, loss)
