"""Who gets the tokens: selection frequency, imbalance, drop ratio."""

from __future__ import annotations

from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Style, axis, layer_axis
from rmoe.report.charts.shared import heat_maps, line, measure_chart, token_count
from rmoe.results.analysis import ModelAnalysis

SECTION = "Load"


def imbalance(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    return measure_chart(
        models,
        looks,
        "load_imbalance",
        SECTION,
        "Load imbalance",
        "Assignments to the most-used expert over the mean of all experts; 1 is even.",
        "ratio",
    )


def frequency(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.frequency, m.frequency_n) for m in models if m.frequency]
    if not having:
        return []
    experts = max(len(row) for _, values, _ in having for row in values)
    layers = max(len(values) for _, values, _ in having)
    data, layout, height = heat_maps(
        [(name, [[100 * v for v in row] for row in values]) for name, values, _ in having],
        columns=2,
        across=axis("expert", tickmode="linear", tick0=0, dtick=max(1, experts // 8)),
        down=layer_axis(layers, autorange="reversed"),
        colour={"cmin": 0, "colorbar": {"title": {"text": "%"}, "ticksuffix": "%"}},
        hover="layer %{y}, expert %{x}: %{z:.2f}%",
    )
    return [
        Chart(
            id="frequency",
            section=SECTION,
            title="Selection frequency",
            definition="Share of a layer's assignments that go to each expert (Fig. 12). "
            f"Even use of {experts} experts would be {100 / experts:.2f}% each.",
            unit="% of assignments",
            sample=token_count([n for _, _, n in having]),
            data=data,
            layout=layout,
            rows=[
                ["model", "layer", "expert", "share"],
                *[
                    [name, layer, expert, share]
                    for name, values, _ in having
                    for layer, row in enumerate(values)
                    for expert, share in enumerate(row)
                ],
            ],
            height=height,
            wide=True,
        )
    ]


def drop_ratio(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    having = [(m.name, m.drop_ratio) for m in models if m.drop_ratio]
    if not having:
        return []
    window = having[0][1].window_tokens
    return [
        Chart(
            id="drop-ratio",
            section=SECTION,
            title="Drop ratio",
            definition="Share of assignments beyond an expert's capacity, cf · T · k / E, were capacity "
            f"enforced (Table 11); T = {window:,} tokens share one capacity.",
            unit="share of assignments",
            sample=f"windows of {window:,} tokens",
            data=[
                line(name, drop.capacity_factor, drop.overall, looks[name], index)
                for index, (name, drop) in enumerate(having)
            ],
            layout={
                "xaxis": axis("capacity factor cf"),
                "yaxis": axis("share dropped", rangemode="tozero", tickformat=".0%"),
                "hovermode": "x unified",
            },
            rows=[
                ["model", "capacity factor", "layer", "share dropped"],
                *[
                    [name, factor, layer, value]
                    for name, drop in having
                    for factor, values in zip(drop.capacity_factor, drop.values, strict=True)
                    for layer, value in enumerate(values)
                ],
            ],
        )
    ]
