"""Every streaming measure at once: fed with recorded batches, giving the fields of a `ModelAnalysis`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.coactivation import Coactivation
from rmoe.analysis.confidence import GateConfidence
from rmoe.analysis.load import Load, frequency, load_imbalance
from rmoe.analysis.mutual_information import ChosenMutualInformation, DigitisedMutualInformation
from rmoe.analysis.paths import FrequentPaths
from rmoe.analysis.token_affinity import TokenAffinity, tracked_tokens
from rmoe.moe.records import RoutingBatch
from rmoe.results import analysis as schema

TOP_PATHS = 20
TOP_TOKENS = 12
MAX_COACTIVATION = 1 << 22
"""Co-activation goes to the file up to so many entries, 2 L E^2; beyond that nobody can look at the charts."""


@dataclass(frozen=True)
class Sizes:
    """L layers, E experts, k per token, C classes (E, or E + 1 with a skip class); E and k by layer."""

    num_layers: int
    num_experts: int
    experts_per_token: int
    num_classes: int
    layer_experts: tuple[int, ...] = ()
    layer_top_k: tuple[int, ...] = ()


class RoutingMeasures:
    """Measures the routing of one model on one text, batch by batch, in memory that the text does not change.

    Args:
        sizes: of the model.
        token_counts: [V] int64, how often each id occurs in the text; their sum is the number of tokens that
            `update` will see, which evenly spaced sampling has to know beforehand.
        explored_tokens: keep the routing of the first so many tokens for the token explorer.
    """

    def __init__(self, sizes: Sizes, token_counts: np.ndarray, explored_tokens: int = 0) -> None:
        layers, experts = sizes.num_layers, sizes.num_experts
        total = int(token_counts.sum())
        ids = tracked_tokens(token_counts, layers, experts)
        self.sizes = sizes
        self.digitised = DigitisedMutualInformation(layers, total)
        self.chosen = ChosenMutualInformation(layers, experts + 1)
        self.confidence = GateConfidence(layers, sizes.num_classes)
        self.load = Load(
            layers, experts, sizes.experts_per_token, total, layers=(sizes.layer_experts, sizes.layer_top_k)
        )
        self.coactivation = Coactivation(layers, experts)
        self.paths = FrequentPaths(layers, experts + 1)
        self.affinity = TokenAffinity(layers, experts, len(token_counts), ids)
        self.explorer = Explorer(explored_tokens)

    def update(self, batch: RoutingBatch, token_ids: Tensor) -> None:
        """Add the next tokens: their routing, and their ids [T] int64."""
        first = batch.first_choice()
        self.digitised.update(batch.probs)
        self.chosen.update(first)
        self.confidence.update(batch)
        self.load.update(batch)
        self.coactivation.update(batch)
        self.paths.update(first)
        self.affinity.update(batch, token_ids)
        self.explorer.update(batch, token_ids)

    def fields(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        """The measured fields of a `ModelAnalysis`.

        Args:
            token_text: how a token id is shown.
        """
        return {
            "mi_digitised": schema.PairMeasure(
                values=self.digitised.result().tolist(),
                chance=self.digitised.chance().tolist(),
                n=self.digitised.n,
            ),
            "mi_chosen": schema.PairMeasure(values=self.chosen.result().tolist(), n=self.chosen.n),
            **self._confidence_fields(),
            **self._load_fields(),
            "coactivation": self._coactivation(),
            "paths": self._paths(),
            "top_tokens": [
                [
                    [
                        schema.TopToken(text=token_text(i), count=count, share=share)
                        for i, count, share in expert
                    ]
                    for expert in layer
                ]
                for layer in self.affinity.top(TOP_TOKENS)
            ],
            "tokens": self.explorer.tokens(token_text, self.sizes.num_experts),
        }

    def _confidence_fields(self) -> dict[str, Any]:
        confidence = self.confidence
        n = confidence.entropy.n
        means = (confidence.entropy_sum / n).tolist()
        inner, inner_overall = confidence.log_inner.medians()
        outer, outer_overall = confidence.outer.medians()
        return {
            "entropy": schema.LayerHistogram(
                edges=confidence.entropy.edges.tolist(), counts=confidence.entropy.counts.tolist(), n=n
            ),
            "entropy_mean": schema.LayerMeasure(values=means, overall=sum(means) / len(means), n=n),
            "inner_balance": schema.LayerMeasure(
                values=np.exp(inner).tolist(), overall=float(np.exp(inner_overall)), n=n
            ),
            "outer_balance": schema.LayerMeasure(values=outer.tolist(), overall=outer_overall, n=n),
        }

    def _load_fields(self) -> dict[str, Any]:
        counts = self.load.total_counts()
        drops, drops_overall = self.load.drop_ratio()
        imbalance = load_imbalance(counts, self.sizes.layer_experts)
        return {
            "frequency": frequency(counts).tolist(),
            "frequency_n": self.load.n,
            "load_imbalance": schema.LayerMeasure(
                values=imbalance.tolist(), overall=float(imbalance.mean()), n=self.load.n
            ),
            "drop_ratio": schema.DropRatio(
                capacity_factor=self.load.capacity_factors,
                values=drops.tolist(),
                overall=drops_overall.tolist(),
                window_tokens=self.load.window_tokens,
            ),
        }

    def _coactivation(self) -> schema.Coactivation | None:
        if 2 * self.sizes.num_layers * self.sizes.num_experts**2 > MAX_COACTIVATION:
            return None
        return schema.Coactivation(
            within=self.coactivation.within().tolist(),
            across=self.coactivation.across().tolist(),
            n=self.coactivation.n,
        )

    def _paths(self) -> schema.Paths:
        n = self.paths.n
        top = [schema.ExpertPath(experts=path, share=count / n) for path, count in self.paths.top(TOP_PATHS)]
        return schema.Paths(top=top, distinct=self.paths.distinct, n=n)


class Explorer:
    """Keeps the routing of the first tokens of the text, token by token.

    Args:
        limit: how many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._experts: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._kept = 0

    def update(self, batch: RoutingBatch, token_ids: Tensor) -> None:
        """Add the next tokens, [T] ids beside their routing."""
        take = min(self.limit - self._kept, batch.num_tokens)
        if take <= 0:
            return
        self._experts.append(batch.experts[:, :take])
        self._weights.append(batch.weights[:, :take])
        self._ids.append(token_ids[:take])
        self._kept += take

    def tokens(self, token_text: Callable[[int], str], num_experts: int) -> list[schema.Token] | None:
        """One entry per token kept, each layer's experts largest weight first; None if none were kept."""
        if not self._kept:
            return None
        experts, weights = torch.cat(self._experts, dim=1), torch.cat(self._weights, dim=1)  # [L, T, K]
        order = weights.masked_fill(experts == num_experts, -torch.inf).argsort(
            stable=True, dim=-1, descending=True
        )
        experts, weights = (
            experts.gather(-1, order).transpose(0, 1),
            weights.gather(-1, order).transpose(0, 1),
        )
        used = (experts < num_experts).sum(-1)  # [T, L]
        return [
            schema.Token(
                text=token_text(token_id),
                experts=[
                    row[:count] for row, count in zip(experts[t].tolist(), used[t].tolist(), strict=True)
                ],
                weights=[
                    row[:count] for row, count in zip(weights[t].tolist(), used[t].tolist(), strict=True)
                ],
            )
            for t, token_id in enumerate(torch.cat(self._ids).tolist())
        ]
