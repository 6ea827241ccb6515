"""The training-time state of routers under a plain `transformers.Trainer`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from rmoe.errors import RequestError
from rmoe.model.modeling_rmoe import RMoEModel
from rmoe.routing.balance import summed_over_ranks
from rmoe.routing.contract import RouterStats
from rmoe.routing.noise import rank_seed


def _warn_of_lost_state(trunk: RMoEModel) -> None:
    """An adapter holds its own parameters and copies: what moves in the base's routers is not saved with it."""
    moving = {
        (part, name.rpartition(".")[2])
        for block in trunk.blocks
        for part in ("gate", "default_outputs")
        if (module := getattr(block, part)) is not None
        if not isinstance(getattr(module, "modules_to_save", None), nn.Module)
        for name, _ in module.named_buffers()
        if name in module.state_dict()
    }
    if moving:
        named = ", ".join(sorted({buffer for _, buffer in moving}))
        parts = ", ".join(sorted({f'"{part}"' for part, _ in moving}))
        said = f"the routers' {named} will move, and the adapter does not save them"
        warnings.warn(f"{said}: add modules_to_save=[{parts}] to its configuration", stacklevel=3)


class RouterUpdates(TrainerCallback):
    """Move an RMoE model's selection biases, schedules and stages after each optimizer step.

    `rmoe train` does so itself; another training program does not know that it must, and biases then stay where they
    were. It also keys the routing noise by the run's seed, the rank and the step, so a resumed run draws what a run
    without a break does. Under DDP set `ddp_broadcast_buffers=False`, or all ranks draw the first one's.

        Trainer(model, args, train_dataset=..., callbacks=[rmoe.RouterUpdates()])

    Counts are summed over the micro-batches of gradient accumulation and over all ranks; evaluation does not count, nor
    what a model in training mode reads without gradients: samples, a reference's probabilities.
    """

    def __init__(self) -> None:
        self._trunk: RMoEModel | None = None
        self._stats: RouterStats | None = None
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Find the routers.

        Raises:
            RequestError: `model` holds no RMoE model.

        Warns:
            UserWarning: `model` has a PEFT adapter that does not save what will move.
        """
        found = next((module for module in model.modules() if isinstance(module, RMoEModel)), None)
        if found is None:
            raise RequestError(
                "model", type(model).__name__, "an RMoE model: its routers have state to update"
            )
        if hasattr(model, "peft_config"):
            _warn_of_lost_state(found)
        self.on_train_end(args, state, control)  # of a training that ended with an error
        self._trunk, self._stats = found, None
        self._handle = found.register_forward_hook(self._add)

    def _add(self, module: Any, args: Any, output: Any) -> None:
        stats = getattr(output, "router_stats", None)
        if stats is not None and module.training and torch.is_grad_enabled():
            self._stats = stats if self._stats is None else self._stats.add(stats)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a step's first forward pass."""
        if self._trunk is not None:
            seed = rank_seed(args.seed, args.process_index)
            self._trunk.set_routing_noise(seed, state.global_step * args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step is done; `state.global_step` counts it."""
        if self._trunk is None or self._stats is None:
            return
        stats, self._stats = self._stats, None
        with torch.no_grad():
            self._trunk.update_routers(stats.map(summed_over_ranks), state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
