"""Experts and router weights."""

from __future__ import annotations

from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Style
from rmoe.report.charts.shared import layer_lines
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
