"""Training through a pipeline of stages: a `Learner` around `rmoe.parallel.Pipeline`.

Each process has one stage, its optimizer, and the same batches as the other stages of its pipeline; the last stage has
the loss. Checkpoints are whole (`rmoe.training.storage.Whole`), so any layout can go on from them.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from accelerate import PartialState
from torch import Tensor, nn

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.parallel import Pipeline
from rmoe.training.accounting import StepSums
from rmoe.training.config import RunConfig
from rmoe.training.learner import Batch, Learner
from rmoe.training.place import Place, Ranks
from rmoe.training.storage import Whole


def build_pipeline(model: RMoEForCausalLM, config: RunConfig, place: Place) -> Pipeline:
    """The pipeline of a run; the model is used up by it.

    Raises:
        RequestError: a model that cannot be cut, or a batch that cannot.
    """
    share = config.training.batch_size // place.ranks.data
    most = max(1, share // config.parallel.pipeline)
    largest = max(size for size in range(1, most + 1) if share % size == 0)
    micro = config.training.micro_batch_size or largest
    if share % micro:
        allowed = f"a divisor of {share}, a pipeline's share of a batch"
        raise RequestError("training.micro_batch_size", micro, allowed)
    return Pipeline(model, share // micro, PartialState().device, config.parallel.replicate, place.bf16)


class PipelineLearner(Learner):
    """A stage of a pipeline, which cuts the batch of a step up itself."""

    parts = 1

    def __init__(self, pipeline: Pipeline, ranks: Ranks) -> None:
        super().__init__(pipeline.part, ranks)
        self.pipeline = pipeline
        self.evaluated = _Evaluated(pipeline)
        self.forward_passes = pipeline.micro_batches
        self.storage = Whole(pipeline.part, pipeline)

    def accumulate(self, batches: list[Batch], sums: StepSums) -> None:
        (batch,) = batches
        loss = self.pipeline.step(batch["input_ids"], batch["labels"])
        # The sums are over copies of the pipeline, and each has its share of the step's tokens in it.
        task = torch.tensor(loss.lm / self.ranks.data, dtype=torch.float64, device=self.pipeline.device)
        balance = torch.tensor(loss.balance, dtype=torch.float64, device=self.pipeline.device)
        sums.add(task, balance, self.pipeline.stats)

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = self.pipeline.norm(parameters)
        return torch.tensor(norm, dtype=torch.float64, device=self.pipeline.device)


class _Evaluated(nn.Module):
    """A pipeline as `evaluate` wants a model: logits on the last stage, None on others."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.part = pipeline.part
        self._forward = pipeline.forward

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """`input_ids` `[B, S]`."""
        return SimpleNamespace(logits=self._forward(input_ids))
