"""Pipeline parallelism for models whose router has a state that crosses stages."""

from rmoe.parallel.pipeline import Pipeline, PipelinePart

__all__ = ["Pipeline", "PipelinePart"]
