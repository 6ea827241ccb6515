"""Text to token blocks. `prepare` is the way in. What needs torch is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rmoe.data.config import SPLITS, DataConfig, SplitName
from rmoe.data.corpus import Corpus
from rmoe.data.ingest import prepare
from rmoe.data.manifest import CorpusManifest
from rmoe.data.order import epoch_order

if TYPE_CHECKING:
    from rmoe.data.blocks import BlockDataset, BlockSampler

__all__ = [
    "SPLITS",
    "BlockDataset",
    "BlockSampler",
    "Corpus",
    "CorpusManifest",
    "DataConfig",
    "SplitName",
    "epoch_order",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in ("BlockDataset", "BlockSampler"):
        return getattr(import_module("rmoe.data.blocks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
