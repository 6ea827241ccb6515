"""The table of layers: each statistic that has one value per layer, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rmoe.report.table import Cell, Column
from rmoe.results.analysis import Analysis, DropRatio


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


def _at_capacity(drop: DropRatio) -> Values:
    return dict(zip(drop.capacity_factor, drop.values, strict=True)).get(CAPACITY)


# (field of `ModelAnalysis`, title, unit, the measure's value for each layer)
STATISTICS: tuple[tuple[str, str, str, Callable[[Any], Values]], ...] = (
    ("entropy_mean", "gate entropy", "nats", lambda entropy: entropy.values),
    ("inner_balance", "inner balance", "top 1 / top 2", lambda balance: balance.values),
    ("outer_balance", "outer balance", "probability", lambda balance: balance.values),
    ("load_imbalance", "load imbalance", "largest / mean", lambda imbalance: imbalance.values),
    ("load", "load, 5%", "of the mean", lambda load: [row[1] for row in load.quantiles]),
    ("load", "load, 95%", "of the mean", lambda load: [row[3] for row in load.quantiles]),
    ("load", "unused experts", "", lambda load: load.dead),
    ("drop_ratio", "drop ratio", f"at capacity {CAPACITY}", _at_capacity),
    ("similarity", "expert similarity", "cosine", lambda similarity: similarity.values),
    ("router_weights", "router norm", "", lambda weights: weights.norm),
    ("gradient_split", "gradient", "language model", lambda split: split.language_model[-1]),
    ("flips", "flips", "share of tokens", lambda flips: flips.values),
    ("saturation", "stability", "choices kept", lambda saturation: saturation.values[-1]),
)


def overview(analysis: Analysis | None) -> Overview:
    """Every statistic that a model has, layer by layer; no rows without any."""
    models = analysis.models if analysis else []
    kept = []
    for field, title, unit, get in STATISTICS:
        found = [getattr(model, field) for model in models]
        values = [get(measure) if measure else None for measure in found]
        if any(values):
            kept.append((Column(title, unit), values, _span(values)))
    if not kept:
        return Overview([], [], False)
    rows = [
        Row(layer, model.name, [_cell(values[index], layer, *span) for _, values, span in kept])
        for layer in range(max(model.layers for model in models))
        for index, model in enumerate(models)
        if layer < model.layers
    ]
    several = len(models) > 1
    first = [Column("layer", numeric=False), *([Column("model", numeric=False)] if several else [])]
    return Overview([*first, *(column for column, _, _ in kept)], rows, several)


def _span(values: Sequence[Values]) -> tuple[float, float]:
    every = [value for of_model in values for value in of_model or ()]
    return min(every), max(every)


def _cell(values: Values, layer: int, low: float, high: float) -> Cell | None:
    if not values or layer >= len(values):
        return None
    value = values[layer]
    shade = (value - low) / (high - low) if high > low else 0.0
    text = f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.3g}"
    return Cell(text, value, shade=round(shade, 3))
