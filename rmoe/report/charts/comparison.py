"""Charts of a comparison, from `summary.json`: paired differences, curves over training, cost."""

from __future__ import annotations

from collections.abc import Iterator

from rmoe.report.charts.chart import Chart, Style, axis, counted, label
from rmoe.report.charts.shared import Looks, line
from rmoe.results.comparison import SPLITS, UNITS, Band, Difference, Summary

# curve -> (title, definition). A curve that is not named here is drawn under its own name.
CURVES = {
    "val": ("Validation loss", "Mean loss over the whole validation split."),
    "train_lm_loss": (
        "Training loss",
        "Language-model part of the loss on the training batches; dropout on.",
    ),
    "aux_loss": (
        "Balance loss",
        "The weighted balance losses, as they are added to the language-model loss.",
    ),
    "gate_entropy": (
        "Gate entropy over training",
        "−Σ g ln g of the gate's probabilities, mean over layers and tokens.",
    ),
    "logit_std": (
        "Scale of the logits over training",
        "Standard deviation of the raw logits over experts, root mean square over tokens, mean over layers. Routers "
        "that start at different scales are also a comparison of initialisations.",
    ),
    "load_imbalance": (
        "Load imbalance over training",
        "Assignments to the busiest expert over the mean of all experts, mean over layers; 1 is even.",
    ),
    "router_grad_norm": (
        "Router gradient norm",
        "Euclidean norm of the gradient of all router parameters, before clipping.",
    ),
}
# Not drawn: the same for every router.
LEFT_OUT = frozenset({"lr"})
BY_LAYER_AT_MOST = 7  # routers, beside the baseline


def comparison_charts(summary: Summary, looks: Looks) -> list[Chart]:
    """Every chart that the summary has data for."""
    names = dict.fromkeys(c for router in summary.routers for c in router.curves if c not in LEFT_OUT)
    curves = sorted(names, key=lambda name: list(CURVES).index(name) if name in CURVES else len(CURVES))
    return [
        *_differences(summary, looks),
        *_sweep(summary, looks),
        *_val_difference(summary, looks),
        *(_curve(summary, curve, looks) for curve in curves),
        *_by_layer(summary),
    ]


def _differences(summary: Summary, looks: Looks) -> Iterator[Chart]:
    compared = [(router.router, router.difference) for router in summary.routers if router.difference]
    if not compared:
        return
    unit, split = UNITS[compared[0][1].unit], SPLITS[compared[0][1].split]
    margin = next((d.equivalence.margin for _, d in compared if d.equivalence), None)
    shapes = [{"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 1.5}}]
    if margin is not None:
        band = {"x0": -margin, "x1": margin, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 0}}
        shapes.append({"type": "rect", "layer": "below", "fillcolor": "rgba(138,143,152,0.16)", **band})
    yield Chart(
        id="differences",
        section="Verdict",
        title=f"Difference to {summary.baseline}, pair by pair",
        definition=f"Router minus {summary.baseline} on the {split} split, with the same seed: same initial weights "
        "where names and shapes agree, same batches. Dots are seeds, the bar is their mean with its "
        f"{summary.confidence:.0%} t interval; left of zero is better than {summary.baseline}."
        + (f" The grey band is ±{margin:g}, inside which a difference counts as none." if margin else ""),
        unit=unit,
        sample=counted([len(d.values) for _, d in compared], "paired seed"),
        data=[trace for name, d in reversed(compared) for trace in _forest(name, d, looks[name])],
        layout={
            "xaxis": axis(f"difference ({unit})"),
            "yaxis": {
                "automargin": True,
                "fixedrange": True,
                "showgrid": False,
                "range": [-0.6, len(compared) - 0.4],
            },
            "shapes": shapes,
            "showlegend": False,
            "margin": {"t": 16},
        },
        height=150 + 46 * len(compared),
        wide=True,
    )


def _forest(name: str, difference: Difference, look: Style) -> list[dict]:
    shown = label(name)
    seeds = {
        "type": "scatter",
        "mode": "markers",
        "x": difference.values,
        "y": [shown] * len(difference.values),
        "text": [f"seed {seed}" for seed in difference.seeds],
        "hovertemplate": "%{text}: %{x:+.4f}<extra></extra>",
        "marker": {"color": look.colour, "size": 8, "opacity": 0.45},
        "name": shown,
    }
    mean = {
        "type": "scatter",
        "mode": "markers",
        "x": [difference.mean],
        "y": [shown],
        "hovertemplate": "mean %{x:+.4f}<extra></extra>",
        "marker": {"color": look.colour, "size": 15, "symbol": "diamond"},
        "name": shown,
    }
    if difference.interval:
        mean["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [difference.interval.high - difference.mean],
            "arrayminus": [difference.mean - difference.interval.low],
            "thickness": 2.5,
            "width": 7,
            "color": look.colour,
        }
    return [seeds, mean]


def _curve(summary: Summary, curve: str, looks: Looks) -> Chart:
    bands = {r.router: r.curves[curve] for r in summary.routers if curve in r.curves}
    default = (curve.replace("_", " ").capitalize(), f"`{curve}` of each run's metrics.")
    title, definition = CURVES.get(curve, default)
    chart = _band_chart(f"curve-{curve}", title, definition, bands, looks)
    if curve == "val":
        chart.layout["yaxis"]["range"] = _settled_range(list(bands.values()))
    return chart


def _by_layer(summary: Summary) -> Iterator[Chart]:
    """What is logged by layer, over steps: heat maps of the baseline and the best routers."""
    best = [router.router for router in summary.routers[:BY_LAYER_AT_MOST]]
    for router in (r for r in summary.routers if r.router in {summary.baseline, *best}):
        for name, curve in router.layer_curves.items():
            title, definition = CURVES[name]
            layers = [f"layer {layer}" for layer in range(len(curve.value[0]))]
            yield Chart(
                id=f"layers-{name}-{router.router}",
                section="By layer over training",
                title=f"{title}, by layer: {router.router}",
                definition=f"{definition} Here each layer on its own; mean over seeds.",
                unit=curve.unit,
                sample=counted([router.finished], "seed"),
                data=[
                    {
                        "type": "heatmap",
                        "x": curve.step,
                        "y": layers,
                        "z": [list(values) for values in zip(*curve.value, strict=True)],
                        "colorscale": "Viridis",
                        "colorbar": {"title": {"text": curve.unit}},
                        "hovertemplate": "step %{x}, %{y}: %{z:.4g}<extra></extra>",
                    }
                ],
                layout={"xaxis": axis("optimizer step"), "yaxis": {"automargin": True}},
            )


def _settled_range(bands: list[Band]) -> list[float]:
    """A range for a loss that leaves its first fall, a fifth of the training, above the frame."""
    start = max(band.step[-1] for band in bands) / 5
    low = min(min(band.low) for band in bands)
    settled = [v for b in bands for s, v in zip(b.step, b.high, strict=True) if s >= start]
    high = max(settled, default=max(b.high[-1] for b in bands))
    pad = 0.06 * (high - low) or 0.1
    return [low - pad, high + pad]


def _val_difference(summary: Summary, looks: Looks) -> Iterator[Chart]:
    bands = {r.router: r.val_difference for r in summary.routers if r.val_difference}
    if not bands:
        return
    chart = _band_chart(
        "val-difference",
        f"Validation loss minus {summary.baseline}'s",
        f"At each evaluation, router minus {summary.baseline} with the same seed; below zero is better.",
        bands,
        looks,
    )
    zero = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 0, "y1": 0, "line": {"width": 1.5}}
    chart.layout["shapes"] = [zero]
    yield chart


def _band_chart(id: str, title: str, definition: str, bands: dict[str, Band], looks: Looks) -> Chart:
    """Curves over training: a line per router and the range of its seeds behind it."""
    unit = next(iter(bands.values())).unit
    unit = UNITS.get(unit, unit)
    return Chart(
        id=id,
        section="Training",
        title=title,
        definition=definition + " Line: mean over seeds; band: lowest to highest seed.",
        unit=unit,
        sample=counted([band.n for band in bands.values()], "seed"),
        data=[
            trace
            for index, (name, band) in enumerate(bands.items())
            for trace in _band(name, band, looks[name], index)
        ],
        layout={"xaxis": axis("optimizer step"), "yaxis": axis(unit), "hovermode": "x unified"},
    )


def _band(name: str, band: Band, look: Style, index: int) -> list[dict]:
    """A mean line and, with more than one seed, the band behind it, which follows the line in the legend."""
    mean = line(name, band.step, band.mean, look, index)
    mean["mode"] = "lines" if len(band.step) > 1 else "markers"
    if band.n == 1:
        return [mean]
    area = {
        **mean,
        "mode": "lines",
        "x": [*band.step, *reversed(band.step)],
        "y": [*band.high, *reversed(band.low)],
        "fill": "toself",
        "fillcolor": look.band,
        "line": {"width": 0, "color": look.colour},
        "hoverinfo": "skip",
        "showlegend": False,
        "name": f"{label(name)} range",
    }
    return [area, mean]


def _sweep(summary: Summary, looks: Looks) -> Iterator[Chart]:
    """Validation loss over the sweep, when one number was swept."""
    points = [p for p in summary.sweep_points if len(p.sweep) == 1]
    if not points or not all(isinstance(value, int | float) for p in points for value in p.sweep.values()):
        return
    swept = next(iter(points[0].sweep))
    spoken, unit = swept.replace("_", " "), UNITS[summary.corpus.unit]
    data = []
    for index, name in enumerate(dict.fromkeys(p.router for p in points)):
        mine = sorted((p for p in points if p.router == name), key=lambda p: float(p.sweep[swept]))
        drawn = line(name, [p.sweep[swept] for p in mine], [p.val for p in mine], looks[name], index)
        drawn["text"] = [counted([p.n], "seed") + (", chosen" if p.chosen else "") for p in mine]
        data.append(
            {**drawn, "mode": "lines+markers", "marker": {"size": [13 if p.chosen else 7 for p in mine]}}
        )
    scale = "log" if all(float(p.sweep[swept]) > 0 for p in points) else "linear"
    yield Chart(
        id="sweep",
        section="Verdict",
        title=f"Choice of {spoken}",
        definition=f"Mean validation figure at each {spoken}, with equal budgets. The large mark is the one chosen for "
        "that router; the test split is evaluated for it alone.",
        unit=unit,
        sample=f"{min(p.n for p in points)} or more seeds a point",
        data=data,
        layout={"xaxis": axis(spoken, type=scale), "yaxis": axis(unit)},
    )
