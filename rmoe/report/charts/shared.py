"""What several routing charts share: lines over layers, heat maps on one scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from rmoe.report.charts.chart import (
    SEQUENTIAL,
    SHOWN_AT_FIRST,
    Chart,
    Panels,
    Style,
    axis,
    counted,
    label,
    layer_axis,
)
from rmoe.results.analysis import LayerMeasure, ModelAnalysis

GAPS_UP_TO = 40  # cells in a line, over all maps in it

T = TypeVar("T")
Having: TypeAlias = Sequence[tuple[ModelAnalysis, T]]
"""The models that have a measure, at least one, each with its own."""
Looks: TypeAlias = dict[str, Style]
Line: TypeAlias = tuple[str, Sequence[float | None], Style, dict[str, Any]]
"""A name, a value per layer, a look, and what else plotly gets."""
Maker: TypeAlias = Callable[[Any, Looks], Iterator[Chart]]
"""Of a `Having` and the models' looks: the charts of the measure."""


def token_count(counts: Sequence[int]) -> str:
    """`12,000 tokens`, or a range when models differ."""
    return counted(counts, "token")


def line(name: str, x: Sequence[Any], y: Sequence[Any], look: Style, index: int = 0) -> dict:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) < 40 else "lines",
        "x": list(x),
        "y": list(y),
        "name": label(name),
        "legendgroup": label(name),
        "visible": True if index < SHOWN_AT_FIRST else "legendonly",
        "line": {"color": look.colour, "dash": look.dash, "width": 2},
        "marker": {"color": look.colour, "size": 6},
    }


def heat_maps(
    titled: Sequence[tuple[str, Sequence[Sequence[float | None]]]],
    columns: int,
    across: dict[str, Any],
    colour: dict[str, Any],
    hover: str,
    down: dict[str, Any] | None = None,
    places_across: Sequence[Sequence[float]] | None = None,
) -> Panels:
    """Heat maps side by side on one colour scale.

    Args:
        titled: title and rows of each.
        columns: maps in a line, at most.
        across: axis.
        colour: of the colour axis.
        hover: plotly template.
        down: axis; None is layers, from the top.
        places_across: where each map's columns stand; None counts them from 0.
    """
    bare = {"showgrid": False}
    titles = [title for title, _ in titled]
    rows = max(len(values) for _, values in titled)
    cells = max(len(row) for _, values in titled for row in values)
    down = down or layer_axis(rows, autorange="reversed")
    panels = Panels(titles, columns, across | bare, down | bare, row_height=_map_height(rows))
    for layout in (panels.layout, panels.narrow.layout):
        layout["coloraxis"] = {"colorscale": SEQUENTIAL, **colour}
    # A gap between small cells would hide them.
    gap = 1 if max(rows, cells * min(columns, len(titled))) <= GAPS_UP_TO else 0
    for index, (title, values) in enumerate(titled):
        panels.add(
            index,
            {
                "type": "heatmap",
                **({"x": list(places_across[index])} if places_across else {}),
                "z": values,
                "name": label(title),
                "coloraxis": "coloraxis",
                "hovertemplate": hover + "<extra></extra>",
                "xgap": gap,
                "ygap": gap,
            },
        )
    return panels


def _map_height(rows: int) -> int:
    """Pixels for a map of so many rows: some for each, within what a screen shows."""
    return max(220, min(520, 9 * rows))


def layer_lines(
    id: str,
    section: str,
    title: str,
    definition: str,
    unit: str,
    sample: str,
    series: Sequence[Line],
) -> Chart:
    """One line per model over layers."""
    layers = max(len(values) for _, values, _, _ in series)
    return Chart(
        id=id,
        section=section,
        title=title,
        definition=definition,
        unit=unit,
        sample=sample,
        data=[
            {**line(name, range(len(values)), values, look, index), **more}
            for index, (name, values, look, more) in enumerate(series)
        ],
        layout={
            "xaxis": layer_axis(layers),
            "yaxis": axis(unit),
            "hovermode": "x unified",
            "showlegend": True,  # for one line too: its name has the value over all layers
        },
    )


def measure_chart(id: str, section: str, title: str, definition: str, unit: str) -> Maker:
    """A maker of the chart of a `LayerMeasure`; the legend gives the overall value, the CSV's names do not."""

    def make(having: Having[LayerMeasure], looks: Looks) -> Iterator[Chart]:
        yield layer_lines(
            id,
            section,
            title,
            definition + " In brackets: over all layers.",
            unit,
            token_count([measure.n for _, measure in having]),
            [
                (
                    m.name,
                    measure.values,
                    looks[m.name],
                    {"name": f"{name} ({measure.overall:.3f})", "meta": name},
                )
                for m, measure in having
                for name in [label(m.name)]
            ],
        )

    return make
