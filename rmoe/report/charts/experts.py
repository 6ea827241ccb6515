"""Experts and router weights."""

from __future__ import annotations

from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Cube, Style, axis, layer_axis
from rmoe.report.charts.shared import heat_maps, layer_lines
from rmoe.results.analysis import ModelAnalysis

SECTION = "Experts"


def similarity(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.similarity) for m in models if m.similarity]
    if not having:
        return []
    series: list[tuple[str, Sequence[float], Style, dict]] = [
        (name, similarity.values, looks[name], {}) for name, similarity in having
    ]
    reference = next((s.random_init for _, s in having if s.random_init), None)
    if reference:
        series.append(("random initialisation", reference, Style("#8A8F98", "dot"), {"mode": "lines"}))
    return [
        layer_lines(
            "similarity",
            SECTION,
            "Expert similarity",
            "Each expert's weight matrices averaged over hidden units, scaled to length one and joined; mean "
            "cosine over all pairs of a layer's experts (Fig. 5). Lower: more diverse.",
            "cosine",
            "all expert weights",
            series,
        )
    ]


def router_weights(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.router_weights) for m in models if m.router_weights]
    if not having:
        return []
    return [
        layer_lines(
            f"router-{field}",
            SECTION,
            title,
            f"{definition} of the scorer's matrix G, which turns features into one logit per expert (Fig. "
            "11).",
            field,
            "all router weights",
            [(name, getattr(weights, field), looks[name], {}) for name, weights in having],
        )
        for field, title, definition in (
            ("norm", "Router weight norm", "Frobenius norm"),
            ("std", "Router weight spread", "Standard deviation of the entries"),
        )
    ]


def saliency(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.saliency) for m in models if m.saliency]
    if not having:
        return []
    experts = max(len(row) for _, values in having for row in values)
    panels = heat_maps(
        having,
        columns=2,
        across=axis("expert", tickmode="linear", tick0=0, dtick=max(1, experts // 8)),
        down=layer_axis(max(len(values) for _, values in having), autorange="reversed"),
        colour={"cmin": 0, "colorbar": {"title": {"text": "saliency"}}},
        hover="layer %{y}, expert %{x}: %{z:.3g}",
    )
    return [
        Chart(
            id="saliency",
            section=SECTION,
            title="Saliency",
            definition="Mean of gate weight times norm of the expert's output, over the tokens it takes (REAP). The "
            "lower, the less is lost without the expert. Blank: no token.",
            unit="weight times norm",
            sample="each expert's own tokens",
            data=panels.data,
            layout=panels.layout,
            rows=Cube(["model", "layer", "expert", "saliency"], dict(having)),
            height=panels.height,
            wide=True,
            narrow=panels.narrow,
        )
    ]
