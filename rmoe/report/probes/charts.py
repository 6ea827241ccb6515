"""Figures of a probe report: one panel per probe, one line per router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rmoe.report.charts.chart import (
    BASELINE_COLOUR,
    Chart,
    Panels,
    Style,
    axis,
    counted,
    label,
    layer_axis,
    styles,
)
from rmoe.report.charts.shared import line
from rmoe.results.probes import Card, Summary

DRAWN = 12  # routers in a figure; the table has all
COLUMNS = 4
LINES = {"blind": "dot", "stateless": "dash", "oracle": "solid"}

Series = Callable[[Card, str], tuple[Sequence[float], Sequence[float]] | None]
"""Of a card and a probe: x and y; None draws no line."""


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
        def series(card: Card, probe: str) -> tuple[Sequence[float], Sequence[float]] | None:
            values = card.details[probe].by_layer.get(name)
            return None if values is None else (layers, values)

        return series

    loss = _figure(
        summary, looks, "loss", "By layer", "Loss by layer", "mean squared error", layered("loss"), across,
        "Mean squared error on test tokens. Grey: what is best without any cue (dotted), with this layer's cue alone "
        "(dashed), with all cues so far (solid).", references=True,
    )  # fmt: skip
    curves = _figure(
        summary, looks, "learning", "Training", "Regret over training", "regret",
        lambda card, probe: (card.details[probe].curve_step, card.details[probe].curve_regret), axis("optimizer step"),
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
    references: bool = False,
) -> Chart:
    """Panels, one per probe, with a line for each router drawn."""
    panels = Panels(summary.probes, COLUMNS, across, axis(unit))
    for panel, probe in enumerate(summary.probes):
        for index, card in enumerate(drawn(summary)):
            found = series(card, probe)
            if found is not None:
                panels.add_line(panel, line(card.router, *found, looks[card.router], index))
    for panel, probe in enumerate(summary.probes if references else ()):
        for name, dash in LINES.items():
            panels.add_line(panel, _reference(name, getattr(summary.references[probe], name), dash))
    return Chart(
        id=id,
        section=section,
        title=title,
        definition=definition,
        unit=unit,
        sample=_seeds(summary.cards, summary),
        **panels.figure(),
    )


def _seeds(cards: Sequence[Card], summary: Summary) -> str:
    return counted([len(card.scores[summary.probes[0]].seeds) for card in cards], "seed")


def _reference(name: str, values: Sequence[float], dash: str) -> dict[str, Any]:
    """One of the computed lines, in grey."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(range(len(values))),
        "y": values,
        "name": name,
        "legendgroup": name,
        "line": {"color": BASELINE_COLOUR, "dash": dash, "width": 3},
        "opacity": 0.55,
    }


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
            sample=_seeds(cards, summary),
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
            wide=True,
        )
    ]


def _sweep(summary: Summary, looks: dict[str, Style]) -> list[Chart]:
    if summary.swept is None:
        return []

    def swept(card: Card, probe: str) -> tuple[list[float], list[float]]:
        mine = sorted(
            (p.value, p.regret) for p in summary.points if (p.router, p.probe) == (card.router, probe)
        )
        return [value for value, _ in mine], [regret for _, regret in mine]

    return [
        _figure(
            summary, looks, "sweep", "Difficulty", f"Regret over {summary.swept}", "regret", swept,
            axis(summary.swept), f"Mean regret over seeds at each value of {summary.swept}.",
        )
    ]  # fmt: skip
