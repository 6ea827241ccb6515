"""Blocks of tokens for torch, and the sampler that orders them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rmoe.data.order import block_number
from rmoe.errors import RequestError

IGNORED = -100  # transformers' ignore_index


class BlockDataset(Dataset[dict[str, Tensor]]):
    """A token file as blocks of `sequence_length` tokens.

    Item i is `{"input_ids": [S] int64, "labels": [S] int64}`. Labels stand where their tokens do and the model shifts
    them, as everywhere in transformers. Neighbouring blocks share `overlap` tokens, at least the one from which the
    next is predicted, and a token is a target once only: with every block read, each token but the first of the split
    is predicted exactly once. Labels at positions that are context only are -100.

    The tokens after the last full block are left out (`whole=False`, training), or taken by a last block moved back to
    end with the split (`whole=True`, evaluation), so that every block has the same shape and no padding.

    Args:
        path: the token file.
        dtype: of its tokens.
        sequence_length: S, tokens per block.
        overlap: tokens repeated from the block before, 1 to S - 1. A target sees at least `overlap` tokens of context,
            but for the first of the split.
        whole: whether the last, partial block counts.

    Raises:
        RequestError: `overlap` is out of range.
        ValueError: the file is shorter than one block (`prepare` never makes such a corpus).
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        sequence_length: int,
        *,
        overlap: int = 1,
        whole: bool = True,
    ) -> None:
        if not 1 <= overlap < sequence_length:
            raise RequestError("overlap", overlap, f"1 to sequence_length - 1 ({sequence_length - 1})")
        self.path, self.dtype = path, dtype
        self.sequence_length, self.stride = sequence_length, sequence_length - overlap
        self.tokens = np.memmap(path, dtype=dtype, mode="r")
        spare = len(self.tokens) - sequence_length
        if spare < 0:
            raise ValueError(
                f"{path.name} has {len(self.tokens)} tokens, fewer than one block of {sequence_length}"
            )
        self.num_blocks = 1 + spare // self.stride
        if whole and spare % self.stride:
            self.num_blocks += 1

    def __len__(self) -> int:
        return self.num_blocks

    def _start(self, block: int) -> int:
        return min(block * self.stride, len(self.tokens) - self.sequence_length)

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        if not 0 <= block < self.num_blocks:
            raise IndexError(block)
        start = self._start(block)
        input_ids = torch.from_numpy(self.tokens[start : start + self.sequence_length].astype(np.int64))
        labels = input_ids.clone()
        # Targets before this one end where the block before ends; the first token of all is never a target.
        seen = self._start(block - 1) + self.sequence_length - start if block else 1
        labels[:seen] = IGNORED
        return {"input_ids": input_ids, "labels": labels}

    def __getstate__(self) -> dict[str, Any]:
        # A memmap would be pickled as a copy of the whole file; a worker process opens the file again.
        return {key: value for key, value in self.__dict__.items() if key != "tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokens = np.memmap(self.path, dtype=self.dtype, mode="r")


class BlockSampler(Sampler[int]):
    """Block numbers of a run's examples `start` to `stop` - 1, counted through all epochs; keeps no state.

    Example g is block `epoch_order(num_blocks, seed, g // num_blocks)[g % num_blocks]`. A run of `steps` steps with a
    global batch of B reads examples 0 to steps * B - 1; resuming after step s is `start = s * B`.

    Args:
        num_blocks: length of the dataset.
        seed: of the data order.
        start: first example.
        stop: one past the last example; None is the end of the epoch that `start` is in.
    """

    def __init__(
        self,
        num_blocks: int,
        seed: int,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        stop = (start // num_blocks + 1) * num_blocks if stop is None else stop
        self.num_blocks, self.seed = num_blocks, seed
        self.examples = range(start, stop)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        for example in self.examples:
            yield block_number(self.num_blocks, self.seed, example)
