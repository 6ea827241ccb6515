"""Gradients, and what changes over training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rmoe.report.charts.chart import Chart, Style, axis, counted, layer_axis
from rmoe.report.charts.shared import heat_maps, line, token_count
from rmoe.results.analysis import Matrix, ModelAnalysis

SECTION = "Gradients and phases"


# Part of the loss -> (how it is said, dash, whether it is drawn; the CSV has all).
_PARTS = {
    "language_model": ("language model", "solid", True),
    "balance": ("balance loss", "dash", True),
    "recurrent": ("recurrent path", "dot", True),
    "language_model_cut": ("language model, recurrent path cut", "dashdot", False),
}


def gradient_split(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """Over training where several steps were measured, else over layers."""
    having = [(m.name, m.gradient_split) for m in models if m.gradient_split]
    if not having:
        return []
    over_steps = any(len(split.step) > 1 for _, split in having)
    data: list[dict] = []
    rows: list[list] = [["model", "part", "step", "layer", "gradient norm"]]
    for index, (name, split) in enumerate(having):
        for field, (said, dash, is_drawn) in _PARTS.items():
            values: Matrix | None = getattr(split, field)
            if values is None:
                continue
            rows += [
                [name, said, step, layer, value]
                for step, row in zip(split.step, values, strict=True)
                for layer, value in enumerate(row)
            ]
            if is_drawn and any(v > 0 for row in values for v in row):  # zero has no place on a log axis
                x = split.step if over_steps else list(range(len(values[0])))
                y = [math.sqrt(sum(v * v for v in row)) for row in values] if over_steps else values[0]
                shown = [v if v > 0 else None for v in y]
                data.append(line(f"{name}, {said}", x, shown, Style(looks[name].colour, dash), index))
    return [
        Chart(
            id="gradient-split",
            section=SECTION,
            title="What pulls on the router",
            definition="Gradient norm of the router's parameters from one part of the loss alone (Table 11): language "
            "model, balance loss, and of the language model's the part that comes back through later layers' router "
            "states: its gradient minus the gradient with that path cut."
            + (" Root of the sum of squares over layers." if over_steps else ""),
            unit="gradient norm",
            sample=token_count([split.tokens for _, split in having]) + " a measurement",
            data=data,
            layout={
                "xaxis": axis("optimizer step")
                if over_steps
                else layer_axis(max(len(split.language_model[0]) for _, split in having)),
                "yaxis": axis("gradient norm", type="log", dtick="D2", exponentformat="power"),
            },
            rows=rows,
            height=440,
            wide=True,
        )
    ]


def saturation(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """By layer for one pair of checkpoints, over training for several."""
    having = [(m.name, m.saturation) for m in models if m.saturation]
    if not having:
        return []
    over_steps = any(len(s.to_step) > 1 for _, s in having)
    data = []
    for index, (name, s) in enumerate(having):
        if over_steps:
            mean = [sum(row) / len(row) for row in s.values]
            drawn = line(name, s.to_step, mean, looks[name], index)
            drawn["text"] = [f"from step {step}" for step in s.from_step]
        else:
            drawn = line(name, range(len(s.values[0])), s.values[0], looks[name], index)
        data.append(drawn)
    first = having[0][1]
    which = (
        "mean over layers; the CSV has every layer"
        if over_steps
        else (f"from step {first.from_step[0]:,} to step {first.to_step[0]:,}")
    )
    return [
        Chart(
            id="saturation",
            section=SECTION,
            title="Routing stability between checkpoints",
            definition="Share of a token's chosen experts that stay the same from one checkpoint to a later one, mean "
            f"over tokens; {which}. 1: routing has settled.",
            unit="share of chosen experts kept",
            sample=token_count([s.n for _, s in having]),
            data=data,
            layout={
                "xaxis": axis("optimizer step of the later checkpoint")
                if over_steps
                else layer_axis(max(len(s.values[0]) for _, s in having)),
                "yaxis": axis("share kept"),
            },
            rows=[
                ["model", "from step", "to step", "layer", "share kept"],
                *[
                    [name, a, b, layer, value]
                    for name, s in having
                    for a, b, row in zip(s.from_step, s.to_step, s.values, strict=True)
                    for layer, value in enumerate(row)
                ],
            ],
        )
    ]


def over_training(models: Sequence[ModelAnalysis], looks: dict[str, Style]) -> list[Chart]:
    """Measures that were recorded on a schedule: layers down, steps across, phase by phase."""
    measures = {measure.name: measure for model in models for measure in model.over_training}
    charts = []
    for name, measure in measures.items():
        having = [(m.name, o) for m in models for o in m.over_training if o.name == name and o.step]
        if not having:
            continue
        layers = max(len(o.values[0]) for _, o in having)
        panels = heat_maps(
            [(model, [list(layer) for layer in zip(*o.values, strict=True)]) for model, o in having],
            columns=3,
            across=axis("optimizer step"),
            down=layer_axis(layers, autorange="reversed"),
            colour={"colorbar": {"title": {"text": measure.unit}}},
            hover="step %{x}, layer %{y}: %{z:.4f}",
            places_across=[o.step for _, o in having],
        )
        charts.append(
            Chart(
                id=f"over-training-{name.replace('_', '-')}",
                section=SECTION,
                title=f"{name.replace('_', ' ').capitalize()}, layer by layer over training",
                definition=measure.definition,
                unit=measure.unit,
                sample=counted([len(o.step) for _, o in having], "measurement"),
                data=panels.data,
                layout=panels.layout,
                rows=[
                    ["model", "step", "layer", measure.unit],
                    *[
                        [model, step, layer, value]
                        for model, o in having
                        for step, row in zip(o.step, o.values, strict=True)
                        for layer, value in enumerate(row)
                    ],
                ],
                height=panels.height,
                wide=True,
                narrow=panels.narrow,
            )
        )
    return charts
