"""Charts of how models route, from `analysis.json`: which there are, and in which order they are read."""

from __future__ import annotations

from rmoe.report.charts import experts, gate, layers, load, phases
from rmoe.report.charts.chart import Chart
from rmoe.report.charts.shared import Looks, Maker
from rmoe.results.analysis import Analysis

# A measure, by the name of its field in `ModelAnalysis`, and what makes its charts.
MAKERS: dict[str, Maker] = {
    "mi_digitised": layers.mi_digitised,
    "mi_chosen": layers.mi_chosen,
    "coactivation": layers.coactivation,
    "paths": layers.paths,
    "predictability": layers.predictability,
    "flips": layers.flips,
    "contributions": layers.contributions,
    "regret": layers.regret,
    "entropy": gate.entropy,
    "entropy_mean": gate.entropy_mean,
    "inner_balance": gate.inner_balance,
    "outer_balance": gate.outer_balance,
    "frequency": load.frequency,
    "load": load.spread,
    "coverage": load.coverage,
    "load_imbalance": load.imbalance,
    "drop_ratio": load.drop_ratio,
    "balance": load.balance_loss,
    "similarity": experts.similarity,
    "router_weights": experts.router_weights,
    "saliency": experts.saliency,
    "gradient_split": phases.gradient_split,
    "saturation": phases.saturation,
}


def routing_charts(analysis: Analysis, looks: Looks) -> list[Chart]:
    """Every chart that the analysis has data for, in reading order."""
    charts: list[Chart] = []
    for field, make in MAKERS.items():
        having = [(model, found) for model in analysis.models if (found := getattr(model, field))]
        charts += make(having, looks) if having else []
    return charts
