"""State that moves once per optimizer step, and that no gradient reaches: biases, temperatures, schedules.

It lives in buffers, so checkpoints carry it, and it moves in `update`, which is called once per optimizer step
with sums over all micro-batches and ranks. A forward pass never changes it: recomputation cannot count twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.routing.contract import RouterStats


class StepState(nn.Module):
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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> StepState:
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
