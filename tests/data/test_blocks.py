"""Blocks: every token a target once, equal shapes, at any length and overlap."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rmoe.data import BlockDataset, BlockSampler
from rmoe.data.blocks import IGNORED
from rmoe.errors import RequestError


def token_file(folder: Path, count: int, dtype: str = "uint16") -> Path:
    path = folder / f"{count}.{dtype}.bin"
    np.arange(count, dtype=dtype).tofile(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def targets(dataset: BlockDataset) -> list[int]:
    """What a model that shifts its labels is asked to predict."""
    labels = [dataset[i]["labels"][1:] for i in range(len(dataset))]
    return [int(label) for block in labels for label in block if label != IGNORED]


@given(length=st.integers(2, 20), extra=st.integers(0, 90), data=st.data())
def test_whole_split_every_token_but_the_first_is_a_target_once(
    folder: Path, length: int, extra: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, length - 1))
    count = length + extra
    dataset = BlockDataset(token_file(folder, count), "uint16", length, overlap=overlap)
    assert targets(dataset) == list(range(1, count))
    for i in range(len(dataset)):
        block = dataset[i]
        assert block["input_ids"].shape == block["labels"].shape == (length,)
        shown = block["labels"] != IGNORED
        assert torch.equal(block["labels"][shown], block["input_ids"][shown])
        # The first target of a block has `overlap` tokens before it, in the last block at least as many.
        first = int(shown.nonzero()[0])
        assert first >= overlap or i == 0
        assert first == overlap or i in (0, len(dataset) - 1)


@given(length=st.integers(2, 20), extra=st.integers(0, 90))
def test_training_reads_full_blocks_only(folder: Path, length: int, extra: int) -> None:
    dataset = BlockDataset(token_file(folder, length + extra), "uint16", length, whole=False)
    assert len(dataset) == 1 + extra // (length - 1)
    assert targets(dataset) == list(range(1, 1 + len(dataset) * (length - 1)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_ids_are_int64_whatever_the_file(folder: Path, dtype: str) -> None:
    top = np.iinfo(dtype).max
    path = folder / f"top.{dtype}"
    np.array([0, 1, top], dtype=dtype).tofile(path)
    block = BlockDataset(path, dtype, 3)[0]
    assert block["input_ids"].dtype == block["labels"].dtype == torch.int64
    assert block["input_ids"].tolist() == [0, 1, top]
    assert block["labels"].tolist() == [IGNORED, 1, top]


def test_a_changed_block_changes_no_other(folder: Path) -> None:
    dataset = BlockDataset(token_file(folder, 100), "uint16", 10)
    dataset[3]["input_ids"].zero_()
    assert dataset[3]["input_ids"].tolist() == list(range(27, 37))


def test_index_out_of_range(folder: Path) -> None:
    dataset = BlockDataset(token_file(folder, 100), "uint16", 10)
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("overlap", [0, 10, 11])
def test_overlap_out_of_range(folder: Path, overlap: int) -> None:
    with pytest.raises(RequestError, match="overlap is"):
        BlockDataset(token_file(folder, 100), "uint16", 10, overlap=overlap)


def test_shorter_than_a_block(folder: Path) -> None:
    with pytest.raises(ValueError, match="fewer than one block"):
        BlockDataset(token_file(folder, 9), "uint16", 10)


def test_pickles_without_its_tokens(folder: Path) -> None:
    dataset = BlockDataset(token_file(folder, 5000), "uint16", 10)
    packed = pickle.dumps(dataset)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[7]["input_ids"], dataset[7]["input_ids"])


def test_loader_with_workers_gives_the_same_batches(folder: Path) -> None:
    dataset = BlockDataset(token_file(folder, 1000), "uint16", 10)
    sampler = BlockSampler(len(dataset), seed=1, stop=40)
    plain, workers = (DataLoader(dataset, batch_size=8, sampler=sampler, num_workers=n) for n in (0, 2))
    for one, other in zip(plain, workers, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["input_ids"].shape == (8, 10)
