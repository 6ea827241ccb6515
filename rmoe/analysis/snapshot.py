"""The cheap measures, for a training loop to record on a schedule.

`rmoe.training.evaluation.summarize_routing` takes one of a finished model; a training loop of your own, on a schedule:

    snapshot = RoutingSnapshot(model.config.num_experts)
    for batch in held_out:
        output = model(**batch, use_cache=False, output_routing=True, logits_to_keep=1)
        snapshot.update(output.routing, batch.get("attention_mask"))
    snapshot.measures()  # name -> one figure per layer; plain JSON
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.confidence import GateConfidence
from rmoe.analysis.load import frequency, load_imbalance
from rmoe.moe.records import RoutingBatch, RoutingRecord
from rmoe.results.analysis import OverTraining
from rmoe.routing.contract import Routing, count_assignments

# name -> (unit, definition)
MEASURES = {
    "gate_entropy": ("nats", "Mean over held-out tokens of -sum_n p_n ln p_n."),
    "inner_balance": (
        "ratio",
        "Median over held-out tokens of the largest over the second largest probability.",
    ),
    "outer_balance": (
        "share",
        "Median over held-out tokens of the sum of the chosen experts' probabilities.",
    ),
    "load_imbalance": ("ratio", "Assignments of the busiest expert over the mean: 1 is perfect balance."),
}


class RoutingSnapshot:
    """Entropy, balance and load of a model's routing, over as many batches as are given.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.confidence: GateConfidence | None = None
        self._counts = torch.zeros(0, num_experts, dtype=torch.int64)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing], attention_mask: Tensor | None = None) -> None:
        """Add one forward pass.

        Args:
            routings: one per MoE layer, for T tokens.
            attention_mask: [B, S] or [T], 0 at padding.
        """
        records = [RoutingRecord.from_routing(routing, self.num_experts) for routing in routings]
        if attention_mask is not None:
            keep = attention_mask.reshape(-1).bool()
            records = [record.select(keep) for record in records]
        batch = RoutingBatch.stack(records)
        if self.confidence is None:
            self.confidence = GateConfidence(len(records), batch.probs.shape[-1])
            self._counts = self._counts.new_zeros(len(records), self.num_experts)
        self.confidence.update(batch)
        self._counts += torch.stack(
            [count_assignments(experts, self.num_experts) for experts in batch.experts]
        )

    def measures(self) -> dict[str, list[float]]:
        """One figure per layer for each of `MEASURES`.

        Raises:
            ValueError: nothing was added.
        """
        if self.confidence is None:
            raise ValueError("no forward pass has been added to this snapshot")
        inner, _ = self.confidence.log_inner.medians()
        outer, _ = self.confidence.outer.medians()
        return {
            "gate_entropy": (self.confidence.entropy_sum / self.confidence.entropy.n).tolist(),
            "inner_balance": np.exp(inner).tolist(),
            "outer_balance": outer.tolist(),
            "load_imbalance": load_imbalance(self._counts.numpy()).tolist(),
        }

    def frequency(self) -> list[list[float]]:
        """`[L][E]`: share of the assignments that each expert takes.

        Raises:
            ValueError: nothing was added.
        """
        if self.confidence is None:
            raise ValueError("no forward pass has been added to this snapshot")
        return frequency(self._counts.numpy()).tolist()


def over_training(
    steps: Sequence[int], snapshots: Sequence[Mapping[str, Sequence[float]]]
) -> list[OverTraining]:
    """Snapshots taken at optimizer steps, as the report shows them: one entry per measure they all have."""
    shared = [name for name in MEASURES if snapshots and all(name in snapshot for snapshot in snapshots)]
    return [
        OverTraining(
            name=name,
            unit=MEASURES[name][0],
            definition=MEASURES[name][1],
            step=list(steps),
            values=[list(snapshot[name]) for snapshot in snapshots],
        )
        for name in shared
    ]
