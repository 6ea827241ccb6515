"""Weights averaged over the last checkpoints (LAWA, arXiv:2209.14981): less noise for the price of a copy.

The average is a running mean over optimizer steps that are known before the run starts. It travels in the checkpoint,
so a run that was killed ends with the same bits, whatever checkpoints rotation has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rmoe.training import state as contents

AVERAGE = "average.safetensors"


class WeightAverage:
    """`mean_n = mean_{n-1} + (w - mean_{n-1}) / n` over the weights `w` after each of `steps`.

    Args:
        model: held whole by this process. Its floating-point tensors are averaged, buffers of the routers included.
        steps: optimizer steps.

    Attributes:
        count: `n`, how many were added.
    """

    def __init__(self, model: nn.Module, steps: frozenset[int]) -> None:
        self.model, self.steps = model, steps
        self.count = 0
        self._mean: dict[str, Tensor] = {}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = contents.unique_tensors(self.model)
        return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Add the weights as they are after `step`, where it is one of `steps`."""
        if step not in self.steps:
            return
        self.count += 1
        for name, tensor in self._tensors().items():
            if self.count == 1:
                self._mean[name] = tensor.clone()
            else:
                self._mean[name] += (tensor - self._mean[name]) / self.count

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, put back afterwards."""
        tensors = self._tensors()
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            _fill(tensors, self._mean)
            yield
        finally:
            _fill(tensors, kept)

    def save(self, folder: Path) -> None:
        """Write the mean, if there is one, into a checkpoint."""
        if self.count:
            contents.save_tensors(folder / AVERAGE, self._mean)

    def check(self, folder: Path, count: int) -> None:
        """Look at a checkpoint's mean before anything is loaded.

        Raises:
            Damaged: it is not this model's.
        """
        if count:
            contents.check_tensors(contents.headers(folder / AVERAGE), self._tensors(), AVERAGE)

    def load(self, folder: Path, count: int) -> None:
        """Go back to what `save` wrote after `count` additions."""
        self.count = count
        tensors = self._tensors()
        stored = load_file(folder / AVERAGE) if count else {}
        self._mean = {name: tensor.to(tensors[name].device) for name, tensor in stored.items()}


@torch.no_grad()
def _fill(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        targets[name].copy_(value)
