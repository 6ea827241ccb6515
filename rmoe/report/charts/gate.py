"""How sure the gate is: entropy, inner and outer balance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from rmoe.report.charts.chart import Chart, Panels, Selector, axis
from rmoe.report.charts.shared import Having, Looks, heat_maps, line, measure_chart, token_count
from rmoe.results.analysis import LayerHistogram

SECTION = "The gate"
PANELS_UP_TO = 16  # layers


def entropy(having: Having[LayerHistogram], looks: Looks) -> Iterator[Chart]:
    """A panel per layer; for many layers a map of all of them, and one layer of the reader's choice.

    Without models of one expert, whose gate has no entropy.
    """
    having = [(model, histogram) for model, histogram in having if histogram.edges[-1] > 0]
    if not having:
        return
    layers = max(len(histogram.counts) for _, histogram in having)
    few = layers <= PANELS_UP_TO
    sample = token_count([histogram.n for _, histogram in having])
    span = _span([histogram for _, histogram in having])
    largest = {m.name: f"{histogram.edges[-1]:.2f}" for m, histogram in having}
    several = len(set(largest.values())) > 1
    named = (f"{value} ({name})" for name, value in largest.items())
    said = ", ".join(named) if several else next(iter(largest.values()))
    panels = _entropy_panels(having, looks, layers, span) if few else _entropy_map(having, span)
    yield Chart(
        id="entropy",
        section=SECTION,
        title="Gate entropy, token by token",
        definition="−Σ g ln g of a token's gate probabilities g over all its C choices, as a distribution over tokens "
        f"(Fig. 4). 0: all on one expert; ln C = {said}: no preference.",
        unit=f"{'nats; each curve' if few else 'density; each layer'} encloses area 1",
        sample=sample,
        **panels.figure(),
    )
    if not few:
        yield _entropy_of_one(having, looks, layers, span, sample)


def _entropy_panels(having: Having[LayerHistogram], looks: Looks, layers: int, span: list[float]) -> Panels:
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
        for index, (m, histogram) in enumerate(having):
            if layer < len(histogram.counts):
                shares = _density(histogram.edges, histogram.counts[layer])
                drawn = line(m.name, _middles(histogram.edges), shares, looks[m.name], index)
                panels.add_line(layer, {**drawn, "mode": "lines"})
    return panels


def _entropy_map(having: Having[LayerHistogram], span: list[float]) -> Panels:
    return heat_maps(
        [(m.name, [_density(h.edges, counts) for counts in h.counts]) for m, h in having],
        columns=2,
        across=axis("nats", range=span),
        colour={"cmin": 0, "colorbar": {"title": {"text": "density"}}},
        hover="layer %{y}, %{x:.3f} nats: density %{z:.3g}",
        places_across=[_middles(h.edges) for _, h in having],
    )


def _entropy_of_one(
    having: Having[LayerHistogram], looks: Looks, layers: int, span: list[float], sample: str
) -> Chart:
    curves = [[_density(h.edges, counts) for counts in h.counts] for _, h in having]
    start = layers // 2
    data = []
    for index, ((m, h), of_layer) in enumerate(zip(having, curves, strict=True)):
        shown = of_layer[start] if start < len(of_layer) else []
        data.append({**line(m.name, _middles(h.edges), shown, looks[m.name], index), "mode": "lines"})
    return Chart(
        id="entropy-layer",
        section=SECTION,
        title="Gate entropy in one layer",
        definition="The same, for a layer of your choice.",
        unit="nats; each curve encloses area 1",
        sample=sample,
        data=data,
        layout={"xaxis": axis("nats", range=span), "yaxis": axis("density", rangemode="tozero")},
        choice=Selector("layer", [f"layer {layer}" for layer in range(layers)], start, "y", curves),
    )


def _middles(edges: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]


def _span(histograms: Sequence[LayerHistogram], rest: float = 0.001) -> list[float]:
    """The stretch of the axis that holds all but `rest` of the tokens of any layer at either end."""
    low, high = [], []
    for histogram in histograms:
        for counts in histogram.counts:
            total = max(sum(counts), 1)
            shares = [seen / total for seen in accumulate(counts)]
            low.append(histogram.edges[next((j for j, s in enumerate(shares) if s > rest), 0)])
            last = next((j for j, s in enumerate(shares) if s >= 1 - rest), len(counts) - 1)
            high.append(histogram.edges[last + 1])
    pad = 0.04 * (max(high) - min(low))
    return [max(0.0, min(low) - pad), max(high) + pad]


def _density(edges: Sequence[float], counts: Sequence[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total / (edges[j + 1] - edges[j]) for j, count in enumerate(counts)]


entropy_mean = measure_chart(
    "entropy-mean", SECTION, "Mean gate entropy by layer", "Mean of −Σ g ln g over tokens.", "nats"
)
inner_balance = measure_chart(
    "inner-balance",
    SECTION,
    "Inner balance",
    "Largest gate score over the second largest, median over tokens (Table 8). 1: the two first experts share alike.",
    "ratio",
)
outer_balance = measure_chart(
    "outer-balance",
    SECTION,
    "Outer balance",
    "Sum of the chosen experts' scores in the softmax over all experts, median over tokens (Table 8).",
    "probability",
)
