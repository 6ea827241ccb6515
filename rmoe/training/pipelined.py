"""Training through a pipeline of stages: `RMoETrainer` around `rmoe.parallel.Pipeline`.

Each process has one stage, its optimizer, and the same batches as the other stages of its pipeline; the last stage has
the loss. Checkpoints are whole (`rmoe.training.storage.Gathered`), so any layout can go on from them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.parallel import Pipeline
from rmoe.training.config import RunConfig
from rmoe.training.place import Place
from rmoe.training.storage import Gathered, Storage
from rmoe.training.trainer import RMoETrainer


def build_pipeline(model: RMoEForCausalLM, config: RunConfig, place: Place) -> Pipeline:
    """The pipeline of a run; the model is used up by it.

    Raises:
        RequestError: a model that cannot be cut, or `training.compile`.
    """
    if config.training.compile:
        raise RequestError("training.compile", True, "False with parallel.pipeline")
    share = config.training.batch_size // place.ranks.data
    micro = config.training.micro_batch_size or max(1, share // config.parallel.pipeline)
    if share % micro:
        allowed = f"a divisor of {share}, a pipeline's share of a batch"
        raise RequestError("training.micro_batch_size", micro, allowed)
    if place.cpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    return Pipeline(model, share // micro, device, config.parallel.replicate)


class PipelineTrainer(RMoETrainer):
    """Args:
    pipeline: its part is the model that transformers' Trainer sees.
    others: as `RMoETrainer`'s, without `model`.
    """

    def __init__(self, pipeline: Pipeline, *others: Any, **named: Any) -> None:
        self.pipeline = pipeline
        super().__init__(pipeline.part, *others, **named)  # type: ignore[arg-type]

    def _storage(self) -> Storage:
        return Gathered(self.model, self.pipeline)

    @property
    def judged(self) -> nn.Module:
        return _Judged(self.pipeline)

    @property
    def micro_batches(self) -> int:
        return self.pipeline.micro_batches

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A whole step: the pipeline cuts its batch up itself and sends the parts through the stages."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.pipeline.step(inputs["input_ids"], inputs["labels"])
        # The sums are over copies of the pipeline, and each has its share of the step's tokens in it.
        task = torch.tensor(loss.lm / self.ranks.data, dtype=torch.float64, device=self.args.device)
        balance = torch.tensor(loss.balance, dtype=torch.float64, device=self.args.device)
        self._sums.add(task, balance, self.pipeline.stats)
        self._judge_gradients(model)
        return task + balance

    def gradient_norm(self, parameters: list[nn.Parameter]) -> float:
        return self.pipeline.norm(parameters)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return torch.tensor(self.pipeline.clip(self.args.max_grad_norm))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self._grad_norm

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing: stages have different parameters, and the pipeline keeps what they share equal."""


class _Judged(nn.Module):
    """A pipeline as `evaluate` wants a model: logits on the last stage, None on others."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.part = pipeline.part
        self._forward = pipeline.forward

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """`input_ids` `[B, S]`."""
        return SimpleNamespace(logits=self._forward(input_ids))
