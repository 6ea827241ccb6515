"""How sure the gate is: entropy, inner and outer balance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Panels, Style, axis
from rmoe.report.charts.shared import line, measure_chart, token_count
from rmoe.results.analysis import LayerHistogram, ModelAnalysis

SECTION = "The gate"


def entropy(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.entropy) for m in models if m.entropy]
    if not having:
        return []
    layers = max(len(histogram.counts) for _, histogram in having)
    panels = Panels(
        [f"layer {layer}" for layer in range(layers)],
        columns=4,
        across=axis("nats", range=_span([histogram for _, histogram in having])),
        down=axis("density", showticklabels=False, rangemode="tozero"),
        gap_x=0.035,
        bottom=True,
    )
    for layer in range(layers):
        for index, (name, histogram) in enumerate(having):
            if layer < len(histogram.counts):
                middles = [(a + b) / 2 for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)]
                shares = _density(histogram.edges, histogram.counts[layer])
                drawn = line(name, middles, shares, looks[name], index)
                panels.add_line(layer, {**drawn, "mode": "lines"})
    return [
        Chart(
            id="entropy",
            section=SECTION,
            title="Gate entropy, token by token",
            definition="−Σ g ln g of a token's gate probabilities g over all experts, as a distribution over "
            f"tokens (Fig. 4). 0: all on one expert; ln E = {math.log(models[0].experts):.2f}: no preference.",
            unit="nats; each curve encloses area 1",
            sample=token_count([histogram.n for _, histogram in having]),
            data=panels.data,
            layout=panels.layout,
            rows=[
                ["model", "layer", "from", "to", "tokens"],
                *[
                    [name, layer, histogram.edges[j], histogram.edges[j + 1], count]
                    for name, histogram in having
                    for layer, counts in enumerate(histogram.counts)
                    for j, count in enumerate(counts)
                ],
            ],
            height=100 + 190 * panels.rows,
            wide=True,
        )
    ]


def _span(histograms: Sequence[LayerHistogram], rest: float = 0.001) -> list[float]:
    """The stretch of the axis that holds all but `rest` of the tokens of any layer at either end."""
    low, high = [], []
    for histogram in histograms:
        for counts in histogram.counts:
            seen, total = 0, max(sum(counts), 1)
            shares = []
            for count in counts:
                seen += count
                shares.append(seen / total)
            low.append(histogram.edges[next((j for j, s in enumerate(shares) if s > rest), 0)])
            last = next((j for j, s in enumerate(shares) if s >= 1 - rest), len(counts) - 1)
            high.append(histogram.edges[last + 1])
    pad = 0.04 * (max(high) - min(low))
    return [max(0.0, min(low) - pad), max(high) + pad]


def _density(edges: Sequence[float], counts: Sequence[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total / (edges[j + 1] - edges[j]) for j, count in enumerate(counts)]


def entropy_by_layer(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    return measure_chart(
        models,
        looks,
        "entropy_mean",
        SECTION,
        "Mean gate entropy by layer",
        "Mean of −Σ g ln g over tokens.",
        "nats",
    )


def balance(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    return measure_chart(
        models,
        looks,
        "inner_balance",
        SECTION,
        "Inner balance",
        "Largest gate score over the second largest, median over tokens (Table 8). 1: the two first experts "
        "share alike.",
        "ratio",
    ) + measure_chart(
        models,
        looks,
        "outer_balance",
        SECTION,
        "Outer balance",
        "Sum of the chosen experts' scores in the softmax over all experts, median over tokens (Table 8).",
        "probability",
    )
