"""What a training loop asks of a model, however its processes hold it.

ModelLearner      a process has the whole model (one process, DDP), or its part of every tensor (FSDP2, TP, EP)
PipelineLearner   a process has a stage of a pipeline (`rmoe.training.pipelined`)
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rmoe.data.blocks import IGNORED
from rmoe.model import RMoEForCausalLM
from rmoe.parallel.sharding import average_replicated, clip, is_sharded, total_norm
from rmoe.training.accounting import StepSums
from rmoe.training.place import Ranks
from rmoe.training.storage import Sharded, Storage, Whole

Batch = dict[str, Tensor]


class Learner(ABC):
    """See the module's text.

    Attributes:
        model: holds this process's parameters and buffers, under the names they have in a checkpoint.
        evaluated: what `rmoe.training.evaluation.evaluate` takes, on all processes together.
        ranks: this process among the others.
        parts: batches that the loop hands over for a step.
        forward_passes: of this process in a step.
        moves_routers: whether the routers' own training state, biases and schedules, moves with each step.
        storage: how the tensors get into a checkpoint.
    """

    parts: int
    forward_passes: int
    storage: Storage

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.model: Any = model
        self.evaluated = model
        self.ranks = ranks
        self.has_routers = self.moves_routers = hasattr(model, "update_routers")

    @abstractmethod
    def accumulate(self, batches: list[Batch], sums: StepSums) -> None:
        """Forward and backward of a step: afterwards the parameters have the gradients of the step's mean loss.

        Args:
            batches: `parts` of them, on the device.
            sums: gets the losses and the routing.
        """

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """The 2-norm of their gradients, the same on every process."""
        return total_norm(p.grad for p in parameters if p.grad is not None)

    def clip(self, most: float, norm: Tensor) -> None:
        """Scale all gradients, whose norm is `norm`, to a norm of at most `most`."""
        clip(list(self.model.parameters()), most, norm)


class ModelLearner(Learner):
    """A causal language model or classifier: of this package, grafted, or any of transformers.

    Args:
        model: whole, or cut up by `rmoe.parallel.sharding.distribute`.
        accelerator: puts it on its device, under autocast, into DDP, and compiles it.
        ranks: which processes see which sequences.
        parts: micro-batches of a process in a step.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, ranks: Ranks, parts: int) -> None:
        super().__init__(model, ranks)
        self.accelerator = accelerator
        self.parts = self.forward_passes = parts
        self.sharded = is_sharded(model)
        self.storage = Sharded(model) if self.sharded and ranks.same == 1 else Whole(model)
        # A sharded model has its place and reduces its own gradients: it gets autocast and compilation alone.
        placed = False if self.sharded else None
        self.forward = accelerator.prepare_model(model, device_placement=placed, evaluation_mode=self.sharded)
        self._counts_tokens = _counts_tokens(model)
        self._skips_logits = isinstance(model, RMoEForCausalLM)

    def accumulate(self, batches: list[Batch], sums: StepSums) -> None:
        tokens = self._tokens(batches) if self._counts_tokens else None
        for batch in batches:
            last = batch is batches[-1]
            if isinstance(self.model, FSDPModule):
                # Replicas (HSDP) meet at the last micro-batch only. FSDP2's reduce-scatter is never put off: a device
                # would hold the whole model's gradients until then.
                self.model.set_requires_all_reduce(last)
            alone = nullcontext() if last or self.sharded else self.accelerator.no_sync(self.forward)
            with alone:
                self.accelerator.backward(self.loss(batch, tokens, sums))
        if self.sharded:
            average_replicated(self.model.parameters())

    def loss(self, batch: Batch, tokens: Tensor | None, sums: StepSums) -> Tensor:
        """The micro-batch's part of the step's loss: its gradients, summed, are those of the mean loss.

        The language-model part is a sum over its tokens divided by the step's tokens on all ranks; the balance part
        a mean over micro-batches, whose number must not change its weight. Ranks with different sequences average
        their gradients, so what is already a share of the whole is multiplied by their number.

        Args:
            batch: the model's inputs, labels among them.
            tokens: those predicted in the step, on all ranks; None is for a loss that is a mean over its micro-batch.
            sums: of the step; gets this micro-batch's losses and routing.
        """
        inputs: dict[str, Any] = dict(batch)
        if self.has_routers:
            inputs["router_stats"] = sums.stats
        if self._skips_logits:
            inputs["output_logits"] = False
        if tokens is not None:
            inputs["num_items_in_batch"] = tokens
        if batch["labels"].shape == batch["input_ids"].shape:  # a language model
            inputs["use_cache"] = False  # with a cache transformers does not see that a row is packed
        outputs = self.forward(**inputs)
        task_loss, balance_loss = self._split_loss(outputs)
        if tokens is None:
            task_loss = task_loss / (self.parts * self.ranks.data)
        balance_loss = balance_loss / self.parts
        sums.add(task_loss, balance_loss, getattr(outputs, "router_stats", None))
        return task_loss * self.ranks.data + balance_loss

    def _split_loss(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """(language-model or task loss, balance losses with their weight)."""
        loss = outputs.loss
        for name in ("lm_loss", "task_loss"):
            if getattr(outputs, name, None) is not None:
                return getattr(outputs, name), outputs.balance_loss
        aux_loss = getattr(outputs, "aux_loss", None)  # of transformers' own MoE models: without its weight
        if aux_loss is None:
            return loss, torch.zeros_like(loss)
        balance_loss = self.model.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return loss - balance_loss, balance_loss

    def _tokens(self, batches: list[Batch]) -> Tensor:
        """Targets of the step on all ranks, those that see the same counted once; the first label is never one."""
        own = torch.stack([(batch["labels"][..., 1:] != IGNORED).sum() for batch in batches]).sum()
        every: Tensor = self.accelerator.gather(own).sum()
        return every / self.ranks.same


def _counts_tokens(model: Any) -> bool:
    """Whether a model's loss is a mean over tokens that it lets the caller count (`num_items_in_batch`)."""
    if getattr(model, "loss_type", None) != "ForCausalLM":
        return False
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter of PEFT's
    if hasattr(inner, "accepts_loss_kwargs"):
        return bool(inner.accepts_loss_kwargs)
    parameters = inspect.signature(inner.forward).parameters.values()
    return any(p.kind == p.VAR_KEYWORD or p.name == "num_items_in_batch" for p in parameters)
