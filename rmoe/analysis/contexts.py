"""Where in the text an expert is used most: the positions of its largest weights."""

from __future__ import annotations

import numpy as np
import torch

from rmoe.moe import RoutingBatch

CONTEXTS = 8


class TopContexts:
    """Streams the positions of each expert's largest weights. Memory is O(L E C).

    Args:
        num_layers, num_experts: L, E.
        count: C, positions per expert.
    """

    def __init__(self, num_layers: int, num_experts: int, count: int = CONTEXTS) -> None:
        shape = (num_layers, num_experts, count)
        self.weights = torch.full(shape, -torch.inf)
        self.positions = torch.full(shape, -1)
        self._seen = 0

    def update(self, batch: RoutingBatch) -> None:
        """Add the next tokens. Of equal weights the earlier position stays."""
        layers, experts, count = self.weights.shape
        position = torch.arange(self._seen, self._seen + batch.num_tokens)[:, None]
        self._seen += batch.num_tokens
        for layer in range(layers):
            used = batch.experts[layer] < experts
            owner = torch.cat([torch.arange(experts).repeat_interleave(count), batch.experts[layer][used]])
            weight = torch.cat([self.weights[layer].flatten(), batch.weights[layer][used]])
            where = torch.cat([self.positions[layer].flatten(), position.expand_as(used)[used]])
            order = weight.argsort(descending=True, stable=True)
            order = order[owner[order].argsort(stable=True)]  # by expert, largest weight first
            owner, weight, where = owner[order], weight[order], where[order]
            starts = torch.searchsorted(owner, torch.arange(experts))
            keep = starts[:, None] + torch.arange(count)
            self.weights[layer], self.positions[layer] = weight[keep], where[keep]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """[L, E, C] int32 positions in the text, -1 beyond an expert's last, and [L, E, C] float32 weights."""
        weights = self.weights.masked_fill(self.positions < 0, 0.0)
        return self.positions.numpy().astype(np.int32), weights.numpy()
