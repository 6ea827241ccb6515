"""The table routers x probes, for the terminal, Markdown and the page."""

from __future__ import annotations

from rmoe.errors import one_line
from rmoe.report.table import aligned, plain
from rmoe.results.probes import MEAN, Card, Score, Summary

HELP = "Regret: 0 is optimal, 1 knows nothing."


def value(score: Score) -> str:
    """Mean regret, with half its 95% interval where there is one."""
    shown = f"{score.mean:.3f}".replace("-", "−")
    if score.interval is None:
        return shown
    return f"{shown} ± {(score.interval.high - score.interval.low) / 2:.3f}"


def columns(summary: Summary) -> list[str]:
    return [MEAN, *summary.probes] if len(summary.probes) > 1 else summary.probes


def cells(card: Card, summary: Summary) -> list[str]:
    return [value(card.scores[probe]) for probe in columns(summary)]


def setting(summary: Summary) -> str:
    """` at noise 0.5`: which value of a swept knob everything but the figure over it is of; else nothing."""
    return f" at {summary.swept} {getattr(summary.knobs, summary.swept)}" if summary.swept else ""


def caption(summary: Summary) -> str:
    seeds = len(summary.cards[0].scores[summary.probes[0]].seeds)
    swept = f" All{setting(summary)}, the first value swept; the figure over {summary.swept} has the others."
    return (
        f"{HELP} "
        + ("Mean ± half the 95% t interval" if seeds > 1 else "Mean")
        + (f" over {seeds} paired seeds." if seeds > 1 else " of one seed: no interval, no verdict.")
        + (swept if summary.swept else "")
    )


def markdown(summary: Summary) -> str:
    """`summary.md`: the table, best router first."""
    heads = ["router", *columns(summary)]
    lines = [
        caption(summary),
        "",
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
        *(f"| `{plain(card.router)}` | " + " | ".join(cells(card, summary)) + " |" for card in summary.cards),
    ]
    return "\n".join([*lines, ""])


def terminal(summary: Summary) -> str:
    body = [["router", *columns(summary)], *([one_line(c.router), *cells(c, summary)] for c in summary.cards)]
    return "\n".join([aligned(body, numbers_from=1), "", caption(summary)])
