"""How sure the gate is: entropy, inner and outer balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from rmoe.report.charts.chart import Chart, Panels, Selector, Style, axis, layer_axis
from rmoe.report.charts.shared import heat_maps, line, measure_chart, token_count
from rmoe.results.analysis import LayerHistogram, ModelAnalysis

SECTION = "The gate"
ENTROPY = "Gate entropy, token by token"
PANELS_UP_TO = 16  # layers


def entropy(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """A panel per layer; for many layers a map of all of them, and one layer of the reader's choice."""
    having = [(m.name, m.entropy) for m in models if m.entropy]
    if not having:
        return []
    layers = max(len(histogram.counts) for _, histogram in having)
    no_preference = f"ln E = {math.log(models[0].experts):.2f}"
    definition = (
        "−Σ g ln g of a token's gate probabilities g over all experts, as a distribution over "
        f"tokens (Fig. 4). 0: all on one expert; {no_preference}: no preference."
    )
    sample = token_count([histogram.n for _, histogram in having])
    span = _span([histogram for _, histogram in having])
    if layers <= PANELS_UP_TO:
        return [_entropy_panels(having, looks, layers, span, definition, sample)]
    return [
        _entropy_map(having, layers, span, definition, sample),
        _entropy_of_one(having, looks, layers, span, sample),
    ]


Having: TypeAlias = Sequence[tuple[str, LayerHistogram]]


def _entropy_panels(
    having: Having, looks: dict[str, Style], layers: int, span: list[float], definition: str, sample: str
) -> Chart:
    panels = Panels(
        [f"layer {layer}" for layer in range(layers)],
        columns=4,
        across=axis("nats", range=span),
        down=axis("density", showticklabels=False, rangemode="tozero"),
        gap_x=0.035,
        bottom=True,
        row_height=130,
        narrow_columns=2,
    )
    for layer in range(layers):
        for index, (name, histogram) in enumerate(having):
            if layer < len(histogram.counts):
                shares = _density(histogram.edges, histogram.counts[layer])
                drawn = line(name, _middles(histogram.edges), shares, looks[name], index)
                panels.add_line(layer, {**drawn, "mode": "lines"})
    return _of_panels(panels, having, "nats; each curve encloses area 1", definition, sample)


def _entropy_map(having: Having, layers: int, span: list[float], definition: str, sample: str) -> Chart:
    panels = heat_maps(
        [(name, [_density(h.edges, counts) for counts in h.counts]) for name, h in having],
        columns=2,
        across=axis("nats", range=span),
        down=layer_axis(layers, autorange="reversed"),
        colour={"cmin": 0, "colorbar": {"title": {"text": "density"}}},
        hover="layer %{y}, %{x:.3f} nats: density %{z:.3g}",
        places_across=[_middles(h.edges) for _, h in having],
    )
    return _of_panels(panels, having, "density; each layer encloses area 1", definition, sample)


def _of_panels(panels: Panels, having: Having, unit: str, definition: str, sample: str) -> Chart:
    return Chart(
        id="entropy",
        section=SECTION,
        title=ENTROPY,
        definition=definition,
        unit=unit,
        sample=sample,
        data=panels.data,
        layout=panels.layout,
        rows=_entropy_rows(having),
        height=panels.height,
        wide=True,
        narrow=panels.narrow,
    )


def _entropy_of_one(
    having: Having, looks: dict[str, Style], layers: int, span: list[float], sample: str
) -> Chart:
    curves = [[_density(h.edges, counts) for counts in h.counts] for _, h in having]
    start = layers // 2
    return Chart(
        id="entropy-layer",
        section=SECTION,
        title="Gate entropy in one layer",
        definition="The same, for a layer of your choice.",
        unit="nats; each curve encloses area 1",
        sample=sample,
        data=[
            {
                **line(
                    name, _middles(h.edges), of_layer[start] if start < len(of_layer) else [], looks[name], i
                ),
                "mode": "lines",
            }
            for i, ((name, h), of_layer) in enumerate(zip(having, curves, strict=True))
        ],
        layout={"xaxis": axis("nats", range=span), "yaxis": axis("density", rangemode="tozero")},
        rows=_entropy_rows(having),
        choice=Selector("layer", [f"layer {layer}" for layer in range(layers)], start, "y", curves),
    )


def _entropy_rows(having: Having) -> list[list[Any]]:
    return [
        ["model", "layer", "from", "to", "tokens"],
        *[
            [name, layer, histogram.edges[j], histogram.edges[j + 1], count]
            for name, histogram in having
            for layer, counts in enumerate(histogram.counts)
            for j, count in enumerate(counts)
        ],
    ]


def _middles(edges: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]


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
