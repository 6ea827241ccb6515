"""Who gets the tokens: selection frequency, imbalance, drop ratio."""

from __future__ import annotations

from collections.abc import Iterator

from rmoe.report.charts.chart import Chart, Selector, Style, axis, label, layer_axis, numbered_axis
from rmoe.report.charts.shared import (
    Having,
    Line,
    Looks,
    heat_maps,
    layer_lines,
    line,
    measure_chart,
    token_count,
)
from rmoe.results.analysis import BalanceAudit, Coverage, DropRatio, LoadSummary, Matrix

SECTION = "Load"


imbalance = measure_chart(
    "load-imbalance",
    SECTION,
    "Load imbalance",
    "Assignments to the most-used expert over the mean of all experts; 1 is even.",
    "ratio",
)


def frequency(having: Having[Matrix], looks: Looks) -> Iterator[Chart]:
    experts = max(len(row) for _, values in having for row in values)
    even = ", ".join(f"{100 / n:.2f}% of {n} experts" for n in sorted({m.experts for m, _ in having}))
    panels = heat_maps(
        [(m.name, [[100 * v for v in row] for row in values]) for m, values in having],
        columns=2,
        across=numbered_axis("expert", experts),
        colour={"cmin": 0, "colorbar": {"title": {"text": "%"}, "ticksuffix": "%"}},
        hover="layer %{y}, expert %{x}: %{z:.2f}%",
    )
    yield Chart(
        id="frequency",
        section=SECTION,
        title="Selection frequency",
        definition=f"Share of a layer's assignments that go to each expert (Fig. 12). Even use is {even}.",
        unit="% of assignments",
        sample=token_count([m.frequency_n for m, _ in having]),
        **panels.figure(),
    )


def drop_ratio(having: Having[DropRatio], looks: Looks) -> Iterator[Chart]:
    window = having[0][1].window_tokens
    yield Chart(
        id="drop-ratio",
        section=SECTION,
        title="Drop ratio",
        definition="Share of assignments beyond an expert's capacity, cf · T · k / E, were capacity "
        f"enforced (Table 11); T = {window:,} tokens share one capacity.",
        unit="share of assignments",
        sample=f"windows of {window:,} tokens",
        data=[
            line(m.name, drop.capacity_factor, drop.overall, looks[m.name], index)
            for index, (m, drop) in enumerate(having)
        ],
        layout={
            "xaxis": axis("capacity factor cf"),
            "yaxis": axis("share dropped", rangemode="tozero", tickformat=".0%"),
            "hovermode": "x unified",
        },
    )


def balance_loss(having: Having[BalanceAudit], looks: Looks) -> Iterator[Chart]:
    """Switch's balance loss of each layer, and how far the model's own reaches."""
    said = [f"{m.name} {'none' if a.model is None else format(a.model, '.4g')}" for m, a in having]
    sample = token_count([audit.tokens for _, audit in having])
    yield layer_lines(
        "balance-loss",
        SECTION,
        "Balance loss",
        "Experts times the sum over experts of share of assignments times mean probability (Switch); 1 is even "
        f"load. Without its coefficient. What the model itself returns: {'; '.join(said)}.",
        "balance loss",
        sample,
        [(m.name, audit.switch, looks[m.name], {}) for m, audit in having],
    )
    trained: list[Line] = [
        (m.name, a.gradient, looks[m.name], {}) for m, a in having if a.gradient is not None
    ]
    if trained:
        yield layer_lines(
            "balance-gradient",
            SECTION,
            "Where the balance loss reaches",
            "Norm of the gradient of the model's own balance loss, without its coefficient, over the parameters of "
            "each layer's router. 0: it does not train that router.",
            "gradient norm",
            sample,
            trained,
        )


def spread(having: Having[LoadSummary], looks: Looks) -> Iterator[Chart]:
    """Lines of one colour per model: from the least to the most used expert."""
    data = []
    for index, (m, load) in enumerate(having):
        for place, (said, dash) in enumerate(_QUANTILES.items()):
            values = [row[place] for row in load.quantiles]
            look = Style(looks[m.name].colour, dash)
            drawn = line(f"{m.name}, {said}", range(len(values)), values, look, index)
            more = {"mode": "lines", "legendgroup": label(m.name), "showlegend": said == "median"}
            data.append({**drawn, **more})
    yield Chart(
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
        height=420,
        wide=True,
    )


_QUANTILES = {
    "smallest": "dot",
    "5th percentile": "dash",
    "median": "solid",
    "95th percentile": "dash",
    "largest": "dot",
}


def coverage(having: Having[Coverage], looks: Looks) -> Iterator[Chart]:
    """A layer of the reader's choice beside the mean of all."""
    layers = max(len(c.values) for _, c in having)
    start = layers // 2
    data, values = [], []
    for index, (m, c) in enumerate(having):
        mean = [sum(column) / len(c.values) for column in zip(*c.values, strict=True)]
        of_layer = c.values[start] if start < len(c.values) else []
        dotted = Style(looks[m.name].colour, "dot")
        data.append(line(m.name, c.hottest, of_layer, looks[m.name], index))
        data.append(line(f"{m.name}, mean of layers", c.hottest, mean, dotted, index))
        values += [c.values, [mean] * layers]
    yield Chart(
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
        choice=Selector("layer", [f"layer {layer}" for layer in range(layers)], start, "y", values),
    )
