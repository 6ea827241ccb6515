"""Who gets the tokens: selection frequency, imbalance, drop ratio."""

from __future__ import annotations

from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Cube, Selector, Style, axis, label, layer_axis
from rmoe.report.charts.shared import heat_maps, layer_lines, line, measure_chart, token_count
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
    panels = heat_maps(
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
            data=panels.data,
            layout=panels.layout,
            rows=Cube(["model", "layer", "expert", "share"], {name: values for name, values, _ in having}),
            height=panels.height,
            wide=True,
            narrow=panels.narrow,
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


def balance_loss(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """Switch's balance loss of each layer, and how far the model's own reaches."""
    having = [(m.name, m.balance) for m in models if m.balance]
    trained = [(name, audit.gradient) for name, audit in having if audit.gradient is not None]
    if not having:
        return []
    said = [f"{name} {'none' if a.model is None else format(a.model, '.4g')}" for name, a in having]
    sample = token_count([audit.tokens for _, audit in having])
    charts = [
        layer_lines(
            "balance-loss",
            SECTION,
            "Balance loss",
            "Experts times the sum over experts of share of assignments times mean probability (Switch); 1 is even "
            f"load. Without its coefficient. What the model itself returns: {'; '.join(said)}.",
            "balance loss",
            sample,
            [(name, audit.switch, looks[name], {}) for name, audit in having],
        )
    ]
    if trained:
        charts.append(
            layer_lines(
                "balance-gradient",
                SECTION,
                "Where the balance loss reaches",
                "Norm of the gradient of the model's own balance loss, without its coefficient, over the parameters of "
                "each layer's router. 0: it does not train that router.",
                "gradient norm",
                sample,
                [(name, gradient, looks[name], {}) for name, gradient in trained],
            )
        )
    return charts


def spread(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """Lines of one colour per model: from the least to the most used expert."""
    having = [(m.name, m.load) for m in models if m.load]
    if not having:
        return []
    data = []
    for index, (name, load) in enumerate(having):
        for place, (said, dash) in enumerate(_QUANTILES.items()):
            values = [row[place] for row in load.quantiles]
            drawn = line(
                f"{name}, {said}", range(len(values)), values, Style(looks[name].colour, dash), index
            )
            more = {"mode": "lines", "legendgroup": label(name), "showlegend": said == "median"}
            data.append({**drawn, **more})
    return [
        Chart(
            id="load-spread",
            section=SECTION,
            title="Load of the least and the most used experts",
            definition="An expert's assignments over the mean of its layer's experts; 1 is even. Solid: the median "
            "expert; dashed: 5th and 95th percentile; dotted: smallest and largest. MaxVio is the largest minus 1.",
            unit="multiple of the mean load",
            sample=token_count([load.n for _, load in having]),
            data=data,
            layout={
                "xaxis": layer_axis(max(len(load.quantiles) for _, load in having)),
                "yaxis": axis("multiple of the mean", rangemode="tozero"),
                "hovermode": "x unified",
            },
            rows=[
                ["model", "layer", *_QUANTILES, "unused experts", "MaxVio"],
                *[
                    [name, layer, *row, load.dead[layer], load.max_violation[layer]]
                    for name, load in having
                    for layer, row in enumerate(load.quantiles)
                ],
            ],
            height=420,
            wide=True,
        )
    ]


_QUANTILES = {
    "smallest": "dot",
    "5th percentile": "dash",
    "median": "solid",
    "95th percentile": "dash",
    "largest": "dot",
}


def coverage(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """A layer of the reader's choice beside the mean of all."""
    having = [(m.name, m.coverage) for m in models if m.coverage]
    if not having:
        return []
    layers = max(len(c.values) for _, c in having)
    start = layers // 2
    data, values = [], []
    for index, (name, c) in enumerate(having):
        mean = [sum(column) / len(c.values) for column in zip(*c.values, strict=True)]
        of_layer = c.values[start] if start < len(c.values) else []
        data.append(line(name, c.hottest, of_layer, looks[name], index))
        data.append(line(f"{name}, mean of layers", c.hottest, mean, Style(looks[name].colour, "dot"), index))
        values += [c.values, [mean] * layers]
    return [
        Chart(
            id="coverage",
            section=SECTION,
            title="Coverage of the most used experts",
            definition="Share of a layer's assignments that its m most used experts take: what is served when only "
            "they are in fast memory.",
            unit="share of assignments",
            sample=token_count([c.n for _, c in having]),
            data=data,
            layout={
                "xaxis": axis("m most used experts"),
                "yaxis": axis("share of assignments", tickformat=".0%", range=[0, 1.03]),
            },
            rows=[
                ["model", "layer", "most used experts", "share"],
                *[
                    [name, layer, m, share]
                    for name, c in having
                    for layer, row in enumerate(c.values)
                    for m, share in zip(c.hottest, row, strict=True)
                ],
            ],
            choice=Selector("layer", [f"layer {layer}" for layer in range(layers)], start, "y", values),
        )
    ]
