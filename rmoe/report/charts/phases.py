"""Gradients, and what changes over training."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rmoe.report.charts.chart import Chart, Style, axis, layer_axis
from rmoe.report.charts.shared import Having, Looks, line, token_count
from rmoe.results.analysis import GradientSplit, Matrix, Saturation

SECTION = "Gradients and phases"


# Part of the loss -> (how it is said, dash).
_PARTS = {
    "language_model": ("language model", "solid"),
    "balance": ("balance loss", "dash"),
    "recurrent": ("recurrent path", "dot"),
}


def gradient_split(having: Having[GradientSplit], looks: Looks) -> Iterator[Chart]:
    """Over training where several steps were measured, else over layers."""
    over_steps = any(len(split.step) > 1 for _, split in having)
    data: list[dict] = []
    for index, (m, split) in enumerate(having):
        for field, (said, dash) in _PARTS.items():
            values: Matrix | None = getattr(split, field)
            if values and any(v > 0 for row in values for v in row):  # zero has no place on a log axis
                x = split.step if over_steps else list(range(len(values[0])))
                y = [math.sqrt(sum(v * v for v in row)) for row in values] if over_steps else values[0]
                shown = [v if v > 0 else None for v in y]
                look = Style(looks[m.name].colour, dash)
                data.append(line(f"{m.name}, {said}", x, shown, look, index))
    yield Chart(
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
        height=440,
        wide=True,
    )


def saturation(having: Having[Saturation], looks: Looks) -> Iterator[Chart]:
    """By layer for one pair of checkpoints, over training for several."""
    over_steps = any(len(s.to_step) > 1 for _, s in having)
    data = []
    for index, (m, s) in enumerate(having):
        if over_steps:
            mean = [sum(row) / len(row) for row in s.values]
            drawn = line(m.name, s.to_step, mean, looks[m.name], index)
            drawn["text"] = [f"from step {step}" for step in s.from_step]
        else:
            drawn = line(m.name, range(len(s.values[0])), s.values[0], looks[m.name], index)
        data.append(drawn)
    model, first = having[0]
    before, after = first.from_step[0], first.to_step[0]
    trained = over_steps or 0 < before < after
    which = "mean over layers" if over_steps else f"from step {before:,} to step {after:,}"
    other = "the other model" if model.flips is None else model.flips.other
    shared = "Share of a token's chosen experts that"
    between = (
        f"{shared} stay the same from one checkpoint to a later one, mean over tokens; {which}. 1: routing has settled."
        if trained
        else f"{shared} {model.name} has in common with {other}, mean over tokens. It says something where both number "
        "their experts alike: one model in two precisions, or before and after training."
    )
    yield Chart(
        id="saturation",
        section=SECTION,
        title="Routing stability between checkpoints" if trained else "Choices in common",
        definition=between,
        unit="share of chosen experts kept",
        sample=token_count([s.n for _, s in having]),
        data=data,
        layout={
            "xaxis": axis("optimizer step of the later checkpoint")
            if over_steps
            else layer_axis(max(len(s.values[0]) for _, s in having)),
            "yaxis": axis("share kept"),
        },
    )
