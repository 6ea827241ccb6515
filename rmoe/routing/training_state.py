"""State that training moves but no gradient reaches: biases, temperatures, schedules.

It lives in buffers, so checkpoints carry it, and it moves in `update`, which is called once per optimizer step
with sums over all micro-batches and ranks. A forward pass never changes it: recomputation cannot count twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.routing.contract import RouterStats
from rmoe.routing.spec import BalanceSpec, Geometry, TemperatureSpec


class TrainingState(nn.Module):
    """A module whose own buffers keep their dtype: in bfloat16 a bias step of 1e-3 is lost, or flips a sign."""

    def start_values(self) -> dict[str, Tensor | None]:
        """Name -> first value of each of this module's own buffers; None is a buffer it does not use."""
        return {}

    def register_state(self) -> None:
        """Register the buffers; the last line of a subclass's `__init__`."""
        for name, value in self.start_values().items():
            self.register_buffer(name, value)

    @torch.no_grad()
    def restart(self, is_loaded: Callable[[Tensor], bool]) -> None:
        """Give buffers their first values again where they hold none: built on the meta device, or not in a checkpoint.

        Args:
            is_loaded: whether a buffer has its value from a checkpoint, and is left alone.
        """
        for name, value in self.start_values().items():
            buffer = self._buffers[name]
            if buffer is not None and value is not None and not is_loaded(buffer):
                buffer.copy_(value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TrainingState:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move the state after optimizer step `step` (from 1) of `total_steps`; `layer` indexes `stats`."""


class SelectionBias(TrainingState):
    """Aux-loss-free balancing (2408.15664): `b += rate * sign(mean load - load)`, float32.

    A skip class, the last of `E + 1`, starts at `skip_bias` and is not moved: it bears no load.
    """

    bias: Tensor

    def __init__(
        self, spec: BalanceSpec, geometry: Geometry, skip_class: bool, skip_bias: float = -1.0
    ) -> None:
        super().__init__()
        self.spec, self.num_experts = spec, geometry.num_experts
        self.skip_class, self.skip_bias = skip_class, skip_bias
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        bias = torch.zeros(self.num_experts + self.skip_class, dtype=torch.float32)
        if self.skip_class:
            bias[-1] = self.skip_bias
        return {"bias": bias}

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        # Integers: mean > load exactly when the sum > E * load, without rounding.
        load = stats.counts[layer]
        direction = torch.sign(load.sum() - self.num_experts * load).to(self.bias)
        if self.spec.bias_centred:
            direction = direction - direction.mean()
        self.bias[: self.num_experts] += self.spec.bias_update_rate * direction


class Temperature(TrainingState):
    """`logits / T`; `T` held, moved geometrically over training, or steered to a target gate entropy."""

    log_value: Tensor

    def __init__(self, spec: TemperatureSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"log_value": torch.tensor(math.log(self.spec.start), dtype=torch.float32)}

    def forward(self, logits: Tensor) -> Tensor:
        return logits * torch.exp(-self.log_value.to(logits.dtype))

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        if self.spec.target_entropy is not None:
            entropy = stats.entropy[layer] / stats.tokens.clamp(min=1)
            self.log_value += self.spec.rate * (self.spec.target_entropy - entropy)
        elif self.spec.end is not None:
            share = min(step / total_steps, 1.0)
            self.log_value.fill_(math.log(self.spec.start) * (1 - share) + math.log(self.spec.end) * share)
