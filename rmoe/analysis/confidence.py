"""How sure a gate is: its entropy (Fig. 4), inner balance and outer balance (Table 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from rmoe.analysis.histogram import StreamingHistogram
from rmoe.moe.records import RoutingBatch
from rmoe.routing.contract import gate_entropy

ENTROPY_BINS = 100
MAX_LOG_RATIO = 30.0  # inner balance beyond e^30 reads e^30: the second score has then all but vanished
LOG_RATIO_BINS = 60_000  # 5e-4 each: an inner balance is off by at most a factor of 1.00025
MASS_BINS = 10_000  # 1e-4 each: an outer balance is off by at most 5e-5


def log_inner_balance(probs: Tensor) -> Tensor:
    """ln(largest / second largest probability), [..., C] -> [...], capped at `MAX_LOG_RATIO` (Table 8).

    0 for a token without any probability, which ReMoE's gate gives where no expert fires. One class alone is at
    the cap.
    """
    if probs.shape[-1] == 1:
        probs = pad(probs, (0, 1))
    first, second = probs.topk(2, dim=-1).values.unbind(-1)
    return (first.log() - second.log()).clamp(max=MAX_LOG_RATIO).nan_to_num(nan=0.0)


class GateConfidence:
    """Streams the three measures, each per token and layer.

    The distributions are kept as histograms, in memory that does not grow: means are exact, medians exact to
    half a bin (see the constants above). The median of a ratio is the exponential of the median of its
    logarithm.

    Args:
        num_layers: L.
        num_classes: C, with the skip class if there is one.
    """

    def __init__(self, num_layers: int, num_classes: int) -> None:
        # The topmost edge is opened by a hair, so that a uniform gate, ln C give or take a rounding, has a
        # bin. One class alone has entropy 0, at the low end of any range.
        highest = (math.log(num_classes) or 1.0) * (1 + 1e-6)
        self.entropy = StreamingHistogram(num_layers, 0.0, highest, ENTROPY_BINS)
        self.entropy_sum = torch.zeros(num_layers, dtype=torch.float64)
        self.log_inner = StreamingHistogram(num_layers, 0.0, MAX_LOG_RATIO, LOG_RATIO_BINS)
        self.outer = StreamingHistogram(num_layers, 0.0, 1.0, MASS_BINS)

    def update(self, batch: RoutingBatch) -> None:
        """Add tokens."""
        entropy = gate_entropy(batch.probs)
        self.entropy.update(entropy)
        self.entropy_sum += entropy.sum(-1, dtype=torch.float64)
        self.log_inner.update(log_inner_balance(batch.probs))
        self.outer.update(batch.chosen_probs().sum(-1))
