"""The comparison's table (Table 1's columns), as cells that HTML, Markdown and the terminal all print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rmoe.errors import one_line
from rmoe.report.charts.chart import counted
from rmoe.results.comparison import UNITS, Difference, RouterSummary, Spread, Summary, unit_of_differences


@dataclass(frozen=True)
class Cell:
    """What is shown, and the exact value behind it where there is one; `shade`: 0 to 1, for the colour."""

    text: str
    value: float | None = None
    note: str = ""
    shade: float = 0.0


BLANK = Cell("–")


@dataclass(frozen=True)
class Column:
    title: str
    unit: str = ""
    numeric: bool = True


def columns(summary: Summary) -> list[Column]:
    return [column for column, _ in _laid_out(summary)]


def rows(summary: Summary) -> list[list[Cell]]:
    """One row per router, in the summary's order; a dash where something was not measured."""
    laid_out = _laid_out(summary)
    return [[cell(router) for _, cell in laid_out] for router in summary.routers]


def _laid_out(summary: Summary) -> list[tuple[Column, Callable[[RouterSummary], Cell]]]:
    """Each column, and its cell of a router."""
    unit = UNITS[summary.corpus.unit]
    bits = UNITS[unit_of_differences(summary.corpus.unit)]

    def verdict(r: RouterSummary) -> Cell:
        if r.router == summary.baseline:
            return Cell("baseline")
        return Cell(r.difference.verdict) if r.difference else BLANK

    against = Column(f"difference to {summary.baseline}", f"{bits}, {summary.confidence:.0%} interval")
    found: list[tuple[Column, Callable[[RouterSummary], Cell]]] = [
        (Column("router", numeric=False), _router),
        (Column("seeds"), _seeds),
        (Column("validation", unit), lambda r: _spread(r.val)),
        (Column("test", unit), lambda r: _spread(r.test)),
        (against, lambda r: _difference(r.difference)),
        (Column("verdict", numeric=False), verdict),
        (Column("seeds needed", "to see 0.01 bits"), lambda r: _seeds_needed(r.difference)),
        (Column("initial logit std", "before step 0"), lambda r: _number(r.initial_logit_std, ".2f")),
        (Column("parameters (router)", "non-embedding"), _parameters),
        (Column("peak memory", "MiB"), lambda r: _number(r.timing.peak_mib if r.timing else None, ",.0f")),
        (
            Column("time", "s per 1k steps"),
            lambda r: _number(r.timing.seconds_per_1k_steps if r.timing else None, ",.1f"),
        ),
    ]
    if any(router.averaged for router in summary.routers):
        found.append((Column("difference of averaged weights", bits), lambda r: _difference(r.averaged)))
    if summary.law is not None:
        equal = Column("difference at equal time", bits)
        found.append((equal, lambda r: _difference(r.equal_time.difference if r.equal_time else None)))
        found.append((Column("effective speed-up", "times"), _speedup))
    if any(router.gate for router in summary.routers):
        found.append((Column("at both sizes", numeric=False), lambda r: Cell(r.gate) if r.gate else BLANK))
    return found


def _number(value: float | None, form: str) -> Cell:
    return BLANK if value is None else Cell(format(value, form), value)


def _router(router: RouterSummary) -> Cell:
    swept = ", ".join(f"{name}={value}" for name, value in router.sweep.items())
    return Cell(router.router, note="; ".join(part for part in (router.summary, swept) if part))


def _seeds(router: RouterSummary) -> Cell:
    failed = f" ({router.failed} failed)" if router.failed else ""
    return Cell(f"{router.finished}{failed}", float(router.finished))


def _spread(spread: Spread | None) -> Cell:
    if spread is None:
        return BLANK
    sd = f" ± {spread.sd:.4f}" if spread.sd is not None else ""
    return Cell(f"{spread.mean:.4f}{sd}", spread.mean)


def signed(value: float, digits: int = 4) -> str:
    """A difference, with its sign.

    >>> signed(-0.01234)
    '−0.0123'
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def _difference(difference: Difference | None) -> Cell:
    if difference is None:
        return BLANK
    interval = difference.interval
    shown = f" [{signed(interval.low)}, {signed(interval.high)}]" if interval else ""
    notes = []
    if difference.p_holm is not None:
        notes.append(f"p {difference.p_holm:.2g} (Holm)")
    if difference.equivalence is not None:
        notes.append(
            f"equivalent within ±{difference.equivalence.margin:g}: p {difference.equivalence.p_holm:.2g} "
            "(TOST, Holm)"
        )
    if difference.sd is not None:
        notes.append(f"standard deviation of a pair {difference.sd:.4f}")
    if difference.text_interval is not None:
        over = difference.text_interval
        notes.append(f"over stretches of text [{signed(over.low)}, {signed(over.high)}]")
    if difference.bootstrap is not None:
        boot = difference.bootstrap
        notes.append(
            f"bootstrap [{signed(boot.interval.low)}, {signed(boot.interval.high)}], "
            f"simulated coverage {boot.simulated_coverage:.0%}"
        )
    return Cell(signed(difference.mean) + shown, difference.mean, "; ".join(notes))


def _speedup(router: RouterSummary) -> Cell:
    found = router.equal_time
    if found is None:
        return BLANK
    interval = found.speedup_interval
    shown = f" [{interval.low:.2f}, {interval.high:.2f}]" if interval else ""
    note = f"{found.seconds_ratio:.3f} times the baseline's seconds a step; {found.difference.verdict}"
    return Cell(f"{found.speedup:.2f}{shown}", found.speedup, note)


def _seeds_needed(difference: Difference | None) -> Cell:
    if difference is None or difference.power is None:
        return BLANK
    seeds = difference.power.seeds
    return Cell(str(seeds), float(seeds)) if seeds is not None else Cell("over 10,000")


def _parameters(router: RouterSummary) -> Cell:
    counts = router.parameters
    if counts is None:
        return BLANK
    text = f"{count_text(counts.non_embedding)} ({count_text(counts.router)})"
    note = f"{count_text(counts.total)} in all, {count_text(counts.active)} active"
    return Cell(text, float(counts.non_embedding), note)


def count_text(count: int) -> str:
    """A parameter count as papers write it.

    >>> count_text(475_904), count_text(36_080_000), count_text(912)
    ('475.9k', '36.08M', '912')
    """
    if count >= 1_000_000:
        return f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.1f}k" if count >= 1_000 else str(count)


def markdown(summary: Summary) -> str:
    """`summary.md`: the verdict, the table and what to keep in mind, for a pull request."""
    heads = columns(summary)
    lines = [
        f"**{plain(summary.verdict)}**",
        "",
        "| " + " | ".join(plain(f"{c.title} ({c.unit})" if c.unit else c.title) for c in heads) + " |",
        "|" + "|".join("---:" if c.numeric else "---" for c in heads) + "|",
        *("| " + " | ".join(plain(cell.text) for cell in row) + " |" for row in rows(summary)),
        "",
        f"Preset `{plain(summary.preset)}`; text {plain(summary.corpus.name)} "
        f"(sha256 `{summary.corpus.sha256[:12]}`); {summary.hardware.accelerator or summary.hardware.cpu}, "
        f"{counted([summary.hardware.threads], 'thread')} a run; "
        f"rmoe {summary.versions.code}. Mean ± standard deviation over seeds; lower is better. "
        "A dash: not measured.",
    ]
    lines += ["", *(f"- {plain(note)}" for note in summary.notes)] if summary.notes else []
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that stays one Markdown cell."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def terminal(summary: Summary) -> str:
    """The table for a terminal of any width: the columns that carry the finding."""
    shown = (0, 1, 2, 3, 4, 5, 7, 8)
    heads = columns(summary)
    body = [[row[i].text for i in shown] for row in rows(summary)]
    return aligned([[heads[i].title for i in shown], [heads[i].unit for i in shown], *body])


def aligned(rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> str:
    """Cells in columns, two spaces apart; those from column `numbers_from` on stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = ["<" if numbers_from is None or index < numbers_from else ">" for index in range(len(widths))]
    form = "  ".join(f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True))
    return "\n".join(form.format(*row).rstrip() for row in rows)
