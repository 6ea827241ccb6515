"""How layers work together: mutual information, co-activation, paths."""

from __future__ import annotations

from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Style, axis, layer_axis
from rmoe.report.charts.shared import heat_maps, line, token_count
from rmoe.results.analysis import Matrix, ModelAnalysis, PairMeasure

SECTION = "Across layers"


def mutual_information(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    definitions = {
        "mi_digitised": (
            "Cross-layer mutual information, the paper's measure",
            "For each token, the two layers' gate probabilities are put into 100 equal bins on [0, 1], and "
            "the mutual "
            "information of the two bin sequences (one entry per expert) is taken; then the mean over tokens "
            "(Fig. 3). It rises with any likeness in the shape of the two distributions.",
        ),
        "mi_chosen": (
            "Cross-layer mutual information of the chosen experts",
            "Mutual information between the first-choice expert of one layer and that of another, over "
            "tokens, with "
            "the bias of finite samples taken off. What knowing one layer's choice tells of the other's.",
        ),
    }
    charts = []
    for field, (title, definition) in definitions.items():
        having: list[tuple[str, PairMeasure]] = [
            (m.name, getattr(m, field)) for m in models if getattr(m, field) is not None
        ]
        if not having:
            continue
        # The diagonal is a layer with itself, its entropy: it would flatten the scale of everything else.
        shown = [(name, _without_diagonal(measure.values)) for name, measure in having]
        by_chance = [(f"{name}, by chance", _without_diagonal(m.chance)) for name, m in having if m.chance]
        shown += by_chance
        off = [v for _, values in shown for row in values for v in row if v is not None]
        if not off:  # one layer: no pair
            continue
        top = max(len(values) for _, values in shown)
        data, layout, height = heat_maps(
            shown,
            columns=min(len(having), 3),
            across=layer_axis(top, constrain="domain"),
            down=layer_axis(top, autorange="reversed"),
            colour={"cmin": min(0.0, *off), "cmax": max(off), "colorbar": {"title": {"text": "nats"}}},
            hover="layers %{y} and %{x}: %{z:.4f} nats",
        )
        charts.append(
            Chart(
                id=field.replace("_", "-"),
                section=SECTION,
                title=title,
                definition=definition
                + (
                    " “By chance”: the same with each layer's experts relabelled at random."
                    if by_chance
                    else ""
                )
                + " The diagonal is left blank.",
                unit="nats",
                sample=token_count([measure.n for _, measure in having]),
                data=data,
                layout=layout,
                rows=[
                    ["model", "layer", "other layer", "nats", "by chance"],
                    *[
                        [name, a, b, value, measure.chance[a][b] if measure.chance else ""]
                        for name, measure in having
                        for a, row in enumerate(measure.values)
                        for b, value in enumerate(row)
                    ],
                ],
                height=height,
                wide=True,
            )
        )
    return charts


def _without_diagonal(values: Matrix) -> list[list[float | None]]:
    return [[None if a == b else value for b, value in enumerate(row)] for a, row in enumerate(values)]


def coactivation(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """First layer pair of every model side by side; all pairs are in the CSV."""
    having = [(m.name, m.coactivation) for m in models if m.coactivation and m.coactivation.across]
    if not having:
        return []
    middle = (min(len(c.across or []) for _, c in having) - 1) // 2
    shown = [(name, [[100 * v for v in row] for row in (c.across or [])[middle]]) for name, c in having]
    experts = max(len(values) for _, values in shown)
    ticks = {"tickmode": "linear", "tick0": 0, "dtick": max(1, experts // 8)}
    data, layout, height = heat_maps(
        shown,
        columns=3,
        across=axis(f"expert in layer {middle + 1}", **ticks),
        down=axis(f"expert in layer {middle}", autorange="reversed", **ticks),
        colour={"cmin": 0, "colorbar": {"title": {"text": "%"}, "ticksuffix": "%"}},
        hover="expert %{y}, then %{x}: %{z:.2f}% of tokens",
    )
    return [
        Chart(
            id="coactivation",
            section=SECTION,
            title="Experts chosen one after the other",
            definition=f"Share of tokens sent to expert a in layer {middle} and expert b in layer "
            f"{middle + 1}. A few bright cells: experts of the two layers work in pairs. The CSV has every "
            "pair "
            "of neighbouring layers.",
            unit="% of tokens",
            sample=token_count([c.n for _, c in having]),
            data=data,
            layout=layout,
            rows=[
                ["model", "layer", "expert", "expert in next layer", "share of tokens"],
                *[
                    [name, layer, a, b, value]
                    for name, c in having
                    for layer, matrix in enumerate(c.across or [])
                    for a, row in enumerate(matrix)
                    for b, value in enumerate(row)
                ],
            ],
            height=height,
            wide=True,
        )
    ]


def paths(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.paths) for m in models if m.paths and m.paths.top]
    if not having:
        return []
    data = []
    for index, (name, paths) in enumerate(having):
        total, sums = 0.0, []
        for path in paths.top:
            total += path.share
            sums.append(total)
        drawn = line(name, range(1, len(sums) + 1), sums, looks[name], index)
        drawn["text"] = ["→".join(map(str, path.experts)) for path in paths.top]
        drawn["hovertemplate"] = "%{y:.1%} of tokens in the %{x} commonest paths, the last %{text}"
        data.append(drawn)
    distinct = "; ".join(f"{name} {paths.distinct:,}" for name, paths in having)
    return [
        Chart(
            id="paths",
            section=SECTION,
            title="Commonest expert paths",
            definition="A token's path is its first-choice expert in every layer. Share of tokens that take "
            f"one of the commonest paths. Distinct paths seen: {distinct}.",
            unit="share of tokens",
            sample=token_count([paths.n for _, paths in having]),
            data=data,
            layout={
                "xaxis": axis("number of commonest paths"),
                "yaxis": axis("share of tokens", tickformat=".0%", rangemode="tozero"),
            },
            rows=[
                ["model", "rank", "path", "share"],
                *[
                    [name, rank, " ".join(map(str, path.experts)), path.share]
                    for name, paths in having
                    for rank, path in enumerate(paths.top, start=1)
                ],
            ],
        )
    ]
