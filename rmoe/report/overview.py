"""The table of layers: each statistic that has one value per layer, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rmoe.results.analysis import Analysis, DropRatio, ModelAnalysis


@dataclass(frozen=True)
class Column:
    title: str
    unit: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Cell:
    """`shade`: 0 at the column's lowest value, 1 at its highest."""

    text: str
    value: float
    shade: float


@dataclass(frozen=True)
class Row:
    layer: int
    model: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Overview:
    """`names_models`: there are several, and the second column says which."""

    columns: list[Column]
    rows: list[Row]
    names_models: bool


Values = Sequence[float] | None
CAPACITY = 1.25

STATISTICS: list[tuple[Column, Callable[[ModelAnalysis], Values]]] = [
    (Column("gate entropy", "nats"), lambda m: m.entropy_mean.values if m.entropy_mean else None),
    (Column("inner balance", "top 1 / top 2"), lambda m: m.inner_balance.values if m.inner_balance else None),
    (Column("outer balance", "probability"), lambda m: m.outer_balance.values if m.outer_balance else None),
    (
        Column("load imbalance", "largest / mean"),
        lambda m: m.load_imbalance.values if m.load_imbalance else None,
    ),
    (Column("load, 5%", "of the mean"), lambda m: [row[1] for row in m.load.quantiles] if m.load else None),
    (Column("load, 95%", "of the mean"), lambda m: [row[3] for row in m.load.quantiles] if m.load else None),
    (Column("unused experts"), lambda m: [row.count(0.0) for row in m.frequency] if m.frequency else None),
    (
        Column("drop ratio", f"at capacity {CAPACITY}"),
        lambda m: _drop_ratio(m.drop_ratio) if m.drop_ratio else None,
    ),
    (Column("expert similarity", "cosine"), lambda m: m.similarity.values if m.similarity else None),
    (Column("router norm"), lambda m: m.router_weights.norm if m.router_weights else None),
    (
        Column("gradient", "language model"),
        lambda m: m.gradient_split.language_model[-1] if m.gradient_split else None,
    ),
    (Column("flips", "share of tokens"), lambda m: m.flips.values if m.flips else None),
    (Column("stability", "choices kept"), lambda m: m.saturation.values[-1] if m.saturation else None),
]


def overview(analysis: Analysis | None) -> Overview:
    """Every statistic that a model has, layer by layer; no rows without any."""
    models = analysis.models if analysis else []
    found = [(column, [get(model) for model in models]) for column, get in STATISTICS]
    kept = [(column, values) for column, values in found if any(values)]
    if not kept:
        return Overview([], [], False)
    spans = [_span(values) for _, values in kept]
    rows = [
        Row(
            layer,
            model.name,
            [_cell(values[index], layer, *span) for (_, values), span in zip(kept, spans, strict=True)],
        )
        for layer in range(max(model.layers for model in models))
        for index, model in enumerate(models)
        if layer < model.layers
    ]
    several = len(models) > 1
    first = [Column("layer", is_text=True), *([Column("model", is_text=True)] if several else [])]
    return Overview([*first, *(column for column, _ in kept)], rows, several)


def _drop_ratio(drop: DropRatio) -> Values:
    return dict(zip(drop.capacity_factor, drop.values, strict=True)).get(CAPACITY)


def _span(values: Sequence[Values]) -> tuple[float, float]:
    every = [value for of_model in values for value in of_model or ()]
    return min(every), max(every)


def _cell(values: Values, layer: int, low: float, high: float) -> Cell | None:
    if not values or layer >= len(values):
        return None
    value = values[layer]
    shade = (value - low) / (high - low) if high > low else 0.0
    text = f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.3g}"
    return Cell(text, value, round(shade, 3))
