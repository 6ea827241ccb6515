"""Models spread over processes: shards (FSDP2, tensor and expert parallelism), pipelines. torch comes on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rmoe.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from rmoe.parallel.pipeline import Pipeline, PipelinePart
    from rmoe.parallel.sharding import distribute

__all__ = ["ParallelConfig", "Pipeline", "PipelinePart", "distribute"]

_FROM = {"Pipeline": "pipeline", "PipelinePart": "pipeline", "distribute": "sharding"}


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(import_module(f"rmoe.parallel.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
