"""Figures of a probe report: one panel per probe, one line per router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rmoe.report.charts.chart import (
    Chart,
    Style,
    axis,
    counted,
    label,
    layer_axis,
    panel_title,
    panels,
    styles,
)
from rmoe.report.charts.shared import line
from rmoe.results.probes import Card, Detail, Summary

DRAWN = 12  # routers in a figure; the table has all
COLUMNS = 4
LINES = {"blind": "dot", "stateless": "dash", "oracle": "solid"}

Series = Callable[[Card, Detail], tuple[Sequence[float], Sequence[float]] | None]


def drawn(summary: Summary) -> list[Card]:
    """The best routers by mean regret, and always the baseline."""
    best = summary.cards[:DRAWN]
    return best + [card for card in summary.cards[DRAWN:] if card.router == summary.baseline]


def probe_charts(summary: Summary) -> list[Chart]:
    """Every figure the summary has data for."""
    looks = styles(sorted(card.router for card in summary.cards), summary.baseline)
    layers = list(range(summary.knobs.layers))
    across = layer_axis(len(layers))

    def layered(name: str) -> Series:
        return lambda card, detail: (layers, detail.by_layer[name]) if name in detail.by_layer else None

    loss = _figure(
        summary, looks, "loss", "By layer", "Loss by layer", "mean squared error", layered("loss"), across,
        "Mean squared error on test tokens. Grey: what is best without any cue (dotted), with this layer's cue alone "
        "(dashed), with all cues so far (solid).",
    )  # fmt: skip
    curves = _figure(
        summary, looks, "learning", "Training", "Regret over training", "regret",
        lambda card, detail: (detail.curve_step, detail.curve_regret), axis("optimizer step"),
        "Regret on tokens kept aside, mean over seeds. 0 is optimal, 1 knows nothing.",
    )  # fmt: skip
    held = _figure(
        summary, looks, "state", "Why", "What the state holds", "accuracy", layered("decodability"), across,
        "How often a linear map of the state handed to the next layer gives the layer's class, on tokens it was not "
        "fitted on. Routers without a state are not drawn.",
    )  # fmt: skip
    chosen = _figure(
        summary, looks, "accuracy", "Why", "Choice against class", "accuracy", layered("accuracy"), across,
        "Share of tokens whose first expert is their class's, experts named one-to-one after classes as well as "
        "can be.",
    )  # fmt: skip
    entropy = _figure(
        summary, looks, "entropy", "Why", "Gate entropy", "nats", layered("entropy"), across,
        "Mean over tokens of -sum g ln g of the gate's probabilities.",
    )  # fmt: skip
    _add_references(loss, summary, layers)
    figures = [loss, curves, held, chosen, entropy]
    return [f for f in figures if f.data] + _recurrent_share(summary, looks) + _sweep(summary, looks)


def _figure(
    summary: Summary,
    looks: dict[str, Style],
    id: str,
    section: str,
    title: str,
    unit: str,
    series: Series,
    across: dict[str, Any],
    definition: str,
) -> Chart:
    """Panels, one per probe, with a line for each router drawn."""
    places = panels(len(summary.probes), COLUMNS)
    layout: dict[str, Any] = {"annotations": [], "margin": {"t": 36}}
    data: list[dict[str, Any]] = []
    rows: list[list[Any]] = [["probe", "router", "x", unit]]
    for probe, (suffix, x, y) in zip(summary.probes, places, strict=True):
        layout[f"xaxis{suffix}"] = {**across, "domain": x, "anchor": f"y{suffix}"}
        layout[f"yaxis{suffix}"] = {**axis(unit if x[0] == 0 else ""), "domain": y, "anchor": f"x{suffix}"}
        layout["annotations"].append(panel_title(probe, x, y))
        for index, card in enumerate(drawn(summary)):
            found = series(card, card.details[probe])
            if found is None:
                continue
            trace = line(card.router, *found, looks[card.router], index)
            data.append(
                {
                    **trace,
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                    "showlegend": probe == summary.probes[0],
                }
            )
            rows += [[probe, card.router, a, b] for a, b in zip(*found, strict=True)]
    seeds = [len(card.scores[summary.probes[0]].seeds) for card in summary.cards]
    lines = -(-len(summary.probes) // COLUMNS)
    return Chart(
        id=id,
        section=section,
        title=title,
        definition=definition,
        unit=unit,
        sample=counted(seeds, "seed"),
        data=data,
        layout=layout,
        rows=rows,
        height=110 + 270 * lines,
        wide=True,
    )


def _add_references(chart: Chart, summary: Summary, layers: list[int]) -> None:
    """The three computed lines, in grey, behind the routers."""
    for probe, (suffix, _, _) in zip(summary.probes, panels(len(summary.probes), COLUMNS), strict=True):
        for name, dash in LINES.items():
            chart.data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": layers,
                    "y": getattr(summary.references[probe], name),
                    "name": name,
                    "legendgroup": name,
                    "showlegend": probe == summary.probes[0],
                    "line": {"color": "#8A8F98", "dash": dash, "width": 3},
                    "opacity": 0.55,
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                }
            )


def _recurrent_share(summary: Summary, looks: dict[str, Style]) -> list[Chart]:
    cards = [c for c in drawn(summary) if any(d.recurrent_share is not None for d in c.details.values())]
    if not cards:
        return []
    values = {c.router: [c.details[p].recurrent_share for p in summary.probes] for c in cards}
    return [
        Chart(
            id="recurrent-share",
            section="Why",
            title="The recurrent gradient's share",
            definition="Norm of the part of the routers' task gradient that comes down through the state, over "
            "the norm of all of it; mean over training.",
            unit="share",
            sample=counted([len(c.scores[summary.probes[0]].seeds) for c in cards], "seed"),
            data=[
                {
                    "type": "bar",
                    "x": summary.probes,
                    "y": found,
                    "name": label(name),
                    "marker": {"color": looks[name].colour},
                }
                for name, found in values.items()
            ],
            layout={"xaxis": axis(""), "yaxis": axis("share"), "barmode": "group"},
            rows=[["router", *summary.probes], *[[name, *found] for name, found in values.items()]],
            wide=True,
        )
    ]


def _sweep(summary: Summary, looks: dict[str, Style]) -> list[Chart]:
    if summary.swept is None:
        return []
    figure = _figure(
        summary, looks, "sweep", "Difficulty", f"Regret over {summary.swept}", "regret",
        lambda card, detail: None, axis(summary.swept), f"Mean regret over seeds at each value of {summary.swept}.",
    )  # fmt: skip
    for probe, (suffix, _, _) in zip(summary.probes, panels(len(summary.probes), COLUMNS), strict=True):
        for index, card in enumerate(drawn(summary)):
            mine = sorted(
                (p.value, p.regret) for p in summary.points if (p.router, p.probe) == (card.router, probe)
            )
            trace = line(card.router, [v for v, _ in mine], [r for _, r in mine], looks[card.router], index)
            figure.data.append(
                {
                    **trace,
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                    "showlegend": probe == summary.probes[0],
                }
            )
            figure.rows.extend([probe, card.router, v, r] for v, r in mine)
    return [figure]
