"""The study's table, from its rows alone: paired differences with intervals over seeds and over text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import log

import numpy as np
from scipy import stats

from experiments.study_rows import StudyRow
from rmoe.compare.statistics import equivalence_p, seeds_needed, t_interval
from rmoe.training.result import TextLosses

REFERENCE = "std-1"  # the grid whose baseline the arms of 12 layers are compared with
OWN_BASELINE = ("depth-", "proxy-")  # grids of another size: compared within themselves


def markdown(rows: Sequence[StudyRow], baseline: str, margin: float) -> str:
    """Markdown: one row per arm."""
    arms: dict[tuple[str, str], dict[int, StudyRow]] = defaultdict(dict)
    for row in rows:
        arms[row.grid, row.router][row.seed] = row
    first = rows[0]
    lines = [
        f"{len(rows)} finished runs of `experiments/study.toml`; text {first.corpus.name} "
        f"(sha256 `{first.corpus.sha256[:12]}`), code {first.versions.code}, "
        + ", ".join(f"{name} {version}" for name, version in first.versions.libraries.items())
        + f"; {first.hardware.cpu}, {first.hardware.threads} thread a run. Bits per byte on the test text, "
        "lower is better. "
        f"Differences are to `{baseline}` in `{REFERENCE}` (grids of another size: in the same grid), seed by seed; "
        f"intervals are 95%, t over seeds. Equivalent: within {margin:g} bits by two one-sided tests. "
        "Not corrected for the number of arms.",
        "",
        "| grid | router | initial logit std | seeds | test | difference | interval over seeds | sd of a pair "
        "| verdict | pairs to see the margin | difference of averaged weights | sd of a pair "
        "| interval over text, seed 0 |",
        "|---|---|---:|---:|---:|---:|---|---:|---|---:|---:|---:|---|",
    ]
    for (grid, router), mine in arms.items():
        home = grid if grid.startswith(OWN_BASELINE) else REFERENCE
        against = {} if (grid, router) == (home, baseline) else arms.get((home, baseline), {})
        lines.append(_line(grid, router, mine, against, margin))
    return "\n".join(lines) + "\n"


def _line(
    grid: str, router: str, mine: dict[int, StudyRow], against: dict[int, StudyRow], margin: float
) -> str:
    scales = [np.mean(row.initial_logits.start) for row in mine.values() if row.initial_logits]
    tests = [row.test for row in mine.values()]
    seeds = sorted(mine.keys() & against.keys())
    raw = [mine[seed].test - against[seed].test for seed in seeds]
    averaged = [(mine[s].averaged.test or 0) - (against[s].averaged.test or 0) for s in seeds]
    cells = [
        grid,
        f"`{router}`",
        f"{np.mean(scales):.2f}" if scales else "",
        str(len(mine)),
        f"{np.mean(tests):.4f}",
        f"{np.mean(raw):+.4f}" if raw else "",
        *_verdict(raw, margin),
        f"{np.mean(averaged):+.4f}" if averaged else "",
        f"{np.std(averaged, ddof=1):.4f}" if len(averaged) > 1 else "",
        _over_text(mine[seeds[0]].test_losses, against[seeds[0]].test_losses) if seeds else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _verdict(differences: list[float], margin: float) -> tuple[str, str, str, str]:
    """Interval, standard deviation of a pair, verdict, and the pairs that would see a difference of the margin."""
    if len(differences) < 2:
        return "", "", "one pair: no verdict" if differences else "", ""
    interval, p = t_interval(differences)
    sd = float(np.std(differences, ddof=1))
    if p < 0.05:
        verdict = "better" if interval.high < 0 else "worse"
    else:
        verdict = "equivalent" if equivalence_p(differences, margin) < 0.05 else "not decided"
    needed = seeds_needed(sd, margin)
    return f"{interval.low:+.4f} to {interval.high:+.4f}", f"{sd:.4f}", verdict, str(needed or "over 10,000")


def _over_text(mine: TextLosses, theirs: TextLosses) -> str:
    """t interval of one pair's difference over stretches of text: what another text of this kind would give."""
    bits = (np.array(mine.nats) - np.array(theirs.nats)) / log(2) * len(mine.nats) / mine.targets
    half = stats.t.ppf(0.975, len(bits) - 1) * stats.sem(bits)
    return f"{bits.mean() - half:+.4f} to {bits.mean() + half:+.4f}"
