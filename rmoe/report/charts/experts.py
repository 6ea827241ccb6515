"""Experts and router weights."""

from __future__ import annotations

from collections.abc import Iterator

from rmoe.report.charts.chart import BASELINE_COLOUR, Chart, Style, numbered_axis
from rmoe.report.charts.shared import Having, Line, Looks, heat_maps, layer_lines
from rmoe.results.analysis import RouterWeights, Similarity

SECTION = "Experts"


def similarity(having: Having[Similarity], looks: Looks) -> Iterator[Chart]:
    series: list[Line] = [(m.name, found.values, looks[m.name], {}) for m, found in having]
    reference = next((s.random_init for _, s in having if s.random_init), None)
    if reference:
        series.append(("random initialisation", reference, Style(BASELINE_COLOUR, "dot"), {"mode": "lines"}))
    yield layer_lines(
        "similarity",
        SECTION,
        "Expert similarity",
        "Each expert's weight matrices averaged over hidden units, scaled to length one and joined; mean "
        "cosine over all pairs of a layer's experts (Fig. 5). Lower: more diverse.",
        "cosine",
        "all expert weights",
        series,
    )


def router_weights(having: Having[RouterWeights], looks: Looks) -> Iterator[Chart]:
    for field, title, definition in (
        ("norm", "Router weight norm", "Frobenius norm"),
        ("std", "Router weight spread", "Standard deviation of the entries"),
    ):
        yield layer_lines(
            f"router-{field}",
            SECTION,
            title,
            f"{definition} of the scorer's matrix G, which turns features into one logit per expert (Fig. 11).",
            field,
            "all router weights",
            [(m.name, getattr(weights, field), looks[m.name], {}) for m, weights in having],
        )


def saliency(having: Having[list[list[float | None]]], looks: Looks) -> Iterator[Chart]:
    named = {m.name: values for m, values in having}
    experts = max(len(row) for values in named.values() for row in values)
    panels = heat_maps(
        list(named.items()),
        columns=2,
        across=numbered_axis("expert", experts),
        colour={"cmin": 0, "colorbar": {"title": {"text": "saliency"}}},
        hover="layer %{y}, expert %{x}: %{z:.3g}",
    )
    yield Chart(
        id="saliency",
        section=SECTION,
        title="Saliency",
        definition="Mean of gate weight times norm of the expert's output, over the tokens it takes (REAP). The "
        "lower, the less is lost without the expert. Blank: no token.",
        unit="weight times norm",
        sample="each expert's own tokens",
        **panels.figure(),
    )
