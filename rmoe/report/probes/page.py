"""`report/index.html` of a probe run: the table, and the figures behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rmoe.report.charts.chart import counted
from rmoe.report.page import laid_out, written
from rmoe.report.probes import table
from rmoe.report.probes.charts import probe_charts
from rmoe.report.table import Cell, Column, signed
from rmoe.results.probes import MEAN, Card, Score, Summary


@dataclass(frozen=True)
class Row:
    router: str
    note: str
    baseline: bool
    cells: list[Cell]


def write_page(folder: Path, summary: Summary, single_file: bool = False) -> Path:
    """Write `index.html` into `folder`; see `rmoe.report.page.written`."""
    return written(folder, lambda plotly: render(summary, plotly), single_file)


def render(summary: Summary, plotly: str | None = None) -> str:
    """The page's HTML; `plotly` is the library's source, to be inlined."""
    parts = {
        "title": _title(summary),
        "facts": _facts(summary),
        "verdict": finding(summary),
        "notes": [f"{c.router} was trained one seed at a time: {c.note}" for c in summary.cards if c.note],
        "columns": [
            Column("router", numeric=False),
            *(Column(name, "regret") for name in table.columns(summary)),
        ],
        "table": [_row(card, summary) for card in summary.cards],
        "caption": table.caption(summary),
        "about": _about(summary),
    }
    return laid_out("probes.html", probe_charts(summary), parts, plotly)


def finding(summary: Summary) -> str:
    """The result in a sentence or two."""
    best = summary.cards[0]
    where = "on the mean of all probes" if len(summary.probes) > 1 else f"on {summary.probes[0]}"
    where += table.setting(summary)
    text = f"{best.router} has the lowest regret {where}, {best.scores[MEAN].mean:.3f}."
    against = best.scores[MEAN].against
    if best.router != summary.baseline and against is not None:
        found = (against.mean, against.interval.low, against.interval.high)
        mean, low, high = (signed(value, 3) for value in found)
        text += f" Against {summary.baseline}: {mean} ({low} to {high}), {against.verdict}."
    return text


def _title(summary: Summary) -> str:
    routers, probes = counted([len(summary.cards)], "router"), counted([len(summary.probes)], "probe")
    return f"{routers} on {probes}"


def _row(card: Card, summary: Summary) -> Row:
    note = f"{card.parameters:,} parameters, {card.seconds:.1f} s a run"
    cells = [
        _cell(card.scores[name], text)
        for name, text in zip(table.columns(summary), table.cells(card, summary), strict=True)
    ]
    return Row(card.router, note, card.router == summary.baseline, cells)


def _cell(score: Score, text: str) -> Cell:
    note = score.against.verdict if score.against is not None else ""
    return Cell(text, score.mean, note, shade=min(max(score.mean, 0.0), 1.0))


def _facts(summary: Summary) -> list[tuple[str, str]]:
    knobs = summary.knobs
    noise = "each probe's own" if knobs.noise is None else f"{knobs.noise:g}"
    return [
        ("layers, experts, k", f"{knobs.layers}, {knobs.experts}, {knobs.top_k}"),
        ("training", f"{knobs.steps} steps of {knobs.tokens} tokens"),
        ("noise", noise),
        ("compared with", summary.baseline),
        *([("swept", f"{summary.swept}; this is{table.setting(summary)}")] if summary.swept else []),
    ]


def _about(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("Code", f"rmoe {summary.code}, torch {summary.torch}"),
        (
            "Statistics",
            "Paired t intervals over seeds; equivalence within "
            f"{summary.margin:g} by two one-sided t tests (TOST); p values corrected over routers by Holm's step-down.",
        ),
        (
            "Regret",
            "(loss − oracle) / (blind − oracle). The oracle knows the exact posterior of the class given all cues so "
            "far, and uses the best k experts and weights for it; blind knows no cue.",
        ),
    ]
