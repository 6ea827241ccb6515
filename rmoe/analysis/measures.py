"""Every streaming measure at once: fed with recorded batches, giving the fields of a `ModelAnalysis`.

`ChoiceMeasures` are those that need only which experts were chosen, as a trace has it; `RoutingMeasures` adds those of
the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.coactivation import Coactivation
from rmoe.analysis.confidence import GateConfidence
from rmoe.analysis.contexts import TopContexts
from rmoe.analysis.load import (
    Load,
    coverage,
    dead_experts,
    frequency,
    hottest_steps,
    load_imbalance,
    max_violation,
    relative_load_quantiles,
)
from rmoe.analysis.mutual_information import ChosenMutualInformation, DigitisedMutualInformation
from rmoe.analysis.options import DEFAULT_MEASURES
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

    def __str__(self) -> str:
        return f"{self.num_layers} MoE layers, {self.num_experts} experts, {self.experts_per_token} per token"


def load_fields(counts: np.ndarray, n: int, layer_experts: Sequence[int] = ()) -> dict[str, Any]:
    """What [L, E] assignments of `n` tokens say, whoever counted them; `layer_experts` as of `load_imbalance`."""
    imbalance, hottest = load_imbalance(counts, layer_experts), hottest_steps(counts.shape[-1])
    return {
        "frequency": frequency(counts).tolist(),
        "frequency_n": n,
        "load_imbalance": schema.LayerMeasure(
            values=imbalance.tolist(), overall=float(imbalance.mean()), n=n
        ),
        "load": schema.LoadSummary(
            quantiles=relative_load_quantiles(counts, layer_experts).tolist(),
            dead=dead_experts(counts, layer_experts).tolist(),
            max_violation=max_violation(counts, layer_experts).tolist(),
            n=n,
        ),
        "coverage": schema.Coverage(hottest=hottest, values=coverage(counts, hottest).tolist(), n=n),
    }


class ChoiceMeasures:
    """Measures who is chosen, batch by batch, in memory that the text does not change.

    Args:
        sizes: of the model; classes are not used.
        total: number of tokens that `update` will see.
        token_counts: [V] int64, how often each id occurs in the text; None where the ids are not known.
        ranked: the first of a token's experts is known; without it no paths and no mutual information.
        names: of `MEASURES`.
    """

    def __init__(
        self,
        sizes: Sizes,
        total: int,
        token_counts: np.ndarray | None,
        ranked: bool = True,
        names: Collection[str] = DEFAULT_MEASURES,
    ) -> None:
        layers, experts = sizes.num_layers, sizes.num_experts
        self.sizes, self.names = sizes, names
        by_layer = sizes.layer_experts, sizes.layer_top_k
        self.load = Load(layers, experts, sizes.experts_per_token, total, layers=by_layer)
        self.coactivation = Coactivation(layers, experts) if "coactivation" in names else None
        mutual = ranked and "mutual-information" in names
        self.chosen = ChosenMutualInformation(layers, experts + 1) if mutual else None
        self.paths = FrequentPaths(layers, experts + 1) if ranked and "paths" in names else None
        self.affinity = None
        if token_counts is not None and "tokens" in names:
            ids = tracked_tokens(token_counts, layers, experts)
            self.affinity = TokenAffinity(layers, experts, len(token_counts), ids)

    def update(self, experts: Tensor, first: Tensor, token_ids: Tensor | None) -> None:
        """Add the next tokens.

        Args:
            experts: [L, T, K] int64, E in an empty slot.
            first: [L, T] int64, the first choice; used if `ranked`.
            token_ids: [T] int64; needed with `token_counts`.
        """
        self.load.update(experts)
        if self.coactivation is not None:
            self.coactivation.update(experts)
        if self.chosen is not None:
            self.chosen.update(first)
        if self.paths is not None:
            self.paths.update(first)
        if self.affinity is not None:
            assert token_ids is not None
            self.affinity.update(experts, token_ids)

    def fields(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        """The measured fields of a `ModelAnalysis`."""
        fields = self._load_fields() if "load" in self.names else {}
        if self.coactivation is not None:
            fields["coactivation"] = self._coactivation(self.coactivation)
        if self.chosen is not None:
            fields["mi_chosen"] = schema.PairMeasure(values=self.chosen.result().tolist(), n=self.chosen.n)
        if self.paths is not None:
            fields["paths"] = self._paths(self.paths)
        if self.affinity is not None:
            fields["top_tokens"] = [
                [
                    [
                        schema.TopToken(text=token_text(i), count=count, share=share)
                        for i, count, share in expert
                    ]
                    for expert in layer
                ]
                for layer in self.affinity.top(TOP_TOKENS)
            ]
        return fields

    def _load_fields(self) -> dict[str, Any]:
        counts = self.load.total_counts()
        drops, drops_overall = self.load.drop_ratio()
        return {
            **load_fields(counts, self.load.n, self.sizes.layer_experts),
            "drop_ratio": schema.DropRatio(
                capacity_factor=self.load.capacity_factors,
                values=drops.tolist(),
                overall=drops_overall.tolist(),
                window_tokens=self.load.window_tokens,
            ),
        }

    def _coactivation(self, measured: Coactivation) -> schema.Coactivation | None:
        if 2 * self.sizes.num_layers * self.sizes.num_experts**2 > MAX_COACTIVATION:
            return None
        return schema.Coactivation(
            within=measured.within().tolist(),
            across=measured.across().tolist(),
            n=measured.n,
        )

    @staticmethod
    def _paths(paths: FrequentPaths) -> schema.Paths:
        n = paths.n
        top = [schema.ExpertPath(experts=path, share=count / n) for path, count in paths.top(TOP_PATHS)]
        return schema.Paths(top=top, distinct=paths.distinct, n=n, is_exact=paths.max_undercount == 0)


class RoutingMeasures:
    """Measures the routing of one model on one text, batch by batch, in memory that the text does not change.

    Args:
        sizes: of the model.
        token_counts: [V] int64, how often each id occurs in the text; their sum is the number of tokens that
            `update` will see, which evenly spaced sampling has to know beforehand.
        explored_tokens: keep the routing of the first so many tokens for the token explorer.
        names: of `MEASURES`; those of the weights, gradients and hidden states are not measured here.
    """

    def __init__(
        self,
        sizes: Sizes,
        token_counts: np.ndarray,
        explored_tokens: int = 0,
        names: Collection[str] = DEFAULT_MEASURES,
    ) -> None:
        total, layers = int(token_counts.sum()), sizes.num_layers
        self.sizes = sizes
        self.choices = ChoiceMeasures(sizes, total, token_counts, names=names)
        self.digitised = (
            DigitisedMutualInformation(layers, total, layer_experts=sizes.layer_experts)
            if "mutual-information" in names
            else None
        )
        self.confidence = GateConfidence(layers, sizes.num_classes) if "confidence" in names else None
        self.explorer = Explorer(explored_tokens if "tokens" in names else 0)
        self.contexts = TopContexts(layers, sizes.num_experts) if "contexts" in names else None

    def update(self, batch: RoutingBatch, token_ids: Tensor) -> None:
        """Add the next tokens: their routing, and their ids [T] int64."""
        self.choices.update(batch.experts, batch.first_choice(), token_ids)
        if self.digitised is not None:
            self.digitised.update(batch.probs)
        if self.confidence is not None:
            self.confidence.update(batch)
        self.explorer.update(batch, token_ids)
        if self.contexts is not None:
            self.contexts.update(batch)

    def fields(self, token_text: Callable[[int], str]) -> dict[str, Any]:
        """The measured fields of a `ModelAnalysis`.

        Args:
            token_text: how a token id is shown.
        """
        fields = self.choices.fields(token_text)
        if self.digitised is not None:
            fields["mi_digitised"] = schema.PairMeasure(
                values=self.digitised.result().tolist(),
                chance=self.digitised.chance().tolist(),
                n=self.digitised.n,
            )
        if self.confidence is not None:
            fields |= self._confidence_fields(self.confidence)
        fields["tokens"] = self.explorer.tokens(token_text, self.sizes.num_experts)
        return fields

    @staticmethod
    def _confidence_fields(confidence: GateConfidence) -> dict[str, Any]:
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
        used = (experts < num_experts).sum(-1).T.tolist()  # [T][L]
        rows = [part.gather(-1, order).transpose(0, 1).tolist() for part in (experts, weights)]
        return [
            schema.Token(
                text=token_text(token_id),
                experts=[row[:count] for row, count in zip(chosen, counts, strict=True)],
                weights=[row[:count] for row, count in zip(weighed, counts, strict=True)],
            )
            for token_id, chosen, weighed, counts in zip(
                torch.cat(self._ids).tolist(), *rows, used, strict=True
            )
        ]
