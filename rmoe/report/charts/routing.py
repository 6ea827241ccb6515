"""Charts of how models route, from `analysis.json`: which there are, and in which order they are read."""

from __future__ import annotations

from rmoe.report.charts import experts, gate, layers, load, phases
from rmoe.report.charts.chart import Chart, Style
from rmoe.results.analysis import Analysis

# Each gives [] without its data.
MAKERS = (
    layers.mutual_information,
    layers.coactivation,
    layers.paths,
    layers.predictability,
    layers.flips,
    layers.contributions,
    layers.regret,
    gate.entropy,
    gate.entropy_by_layer,
    gate.balance,
    load.frequency,
    load.spread,
    load.coverage,
    load.imbalance,
    load.drop_ratio,
    load.balance_loss,
    experts.similarity,
    experts.router_weights,
    experts.saliency,
    phases.gradient_split,
    phases.saturation,
    phases.over_training,
)


def routing_charts(analysis: Analysis, looks: dict[str, Style]) -> list[Chart]:
    """Every chart that the analysis has data for, in reading order."""
    return [chart for make in MAKERS for chart in make(analysis.models, looks)]
