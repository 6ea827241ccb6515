"""The study's table, from its rows alone: paired differences with intervals over seeds and over text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from experiments.study_rows import StudyRow
from rmoe.compare.statistics import compare_to_baseline, decide, seeds_needed, t_interval, text_interval
from rmoe.results.comparison import Difference

Arms = dict[tuple[str, str], dict[int, StudyRow]]

LOOKS = (5, 8)  # pairs; fixed beforehand in study.md
# Grids of another size or learning rate: compared within themselves.
OWN_BASELINE = ("depth-", "proxy-", "long-", "rate-")


class Contrast(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A difference between two arms, each `grid/router`.

    Attributes:
        planned: fixed before its runs: judged at the looks that the arms have, with Holm's correction over all planned
            ones of a plan.
    """

    question: str
    of: str
    minus: str
    planned: bool = False


def markdown(
    rows: Sequence[StudyRow],
    baseline: str,
    margin: float,
    reference: str = "std-1",
    plan: str = "study.toml",
    planned: Iterable[tuple[str, str]] = (),
) -> str:
    """Markdown: one row per arm.

    Args:
        reference: the grid whose baseline the arms of the study's size are compared with.
        planned: every (grid, router) of the plan: verdicts are corrected for those still to come too.
    """
    arms = arms_of(rows)
    first = rows[0]
    machines = Counter(row.hardware.accelerator or row.hardware.cpu for row in rows)
    on = ", ".join(f"{machine} ({runs} runs)" for machine, runs in machines.items())
    codes = " and ".join(dict.fromkeys(row.versions.code for row in rows))
    lines = [
        f"{len(rows)} finished runs of `experiments/{plan}`; text {first.corpus.name} "
        f"(sha256 `{first.corpus.sha256[:12]}`), code {codes}, "
        + ", ".join(f"{name} {version}" for name, version in first.versions.libraries.items())
        + f"; {on}, {first.hardware.threads} thread a run. Bits per byte on the test text, "
        "lower is better. "
        f"Differences are to `{baseline}` in `{reference}` (grids of another size or learning rate: in the same "
        "grid), seed by seed; intervals are 95%, t over seeds. "
        f"Verdicts come at {LOOKS[0]} pairs, and at {LOOKS[1]} for what is then not decided, "
        "with an O'Brien-Fleming boundary over both looks and Holm's correction over all arms planned with "
        "a baseline. "
        f"Equivalent: within {margin:g} bits by two one-sided tests.",
        "",
        "| grid | router | initial logit std | seeds | test | difference | interval over seeds | sd of a pair "
        "| verdict | pairs to see the margin | difference of averaged weights | sd of a pair "
        "| interval over text |",
        "|---|---|---:|---:|---:|---:|---|---:|---|---:|---:|---:|---|",
    ]
    verdicts = _verdicts(arms, baseline, margin, reference, set(planned))
    for (grid, router), mine in arms.items():
        own = home(grid, reference), baseline
        against = {} if (grid, router) == own else arms.get(own, {})
        lines.append(_line(grid, router, mine, against, margin, verdicts.get((grid, router))))
    return "\n".join(lines) + "\n"


def arms_of(rows: Sequence[StudyRow]) -> Arms:
    """(grid, router) -> seed -> run."""
    arms: Arms = defaultdict(dict)
    for row in rows:
        arms[row.grid, row.router][row.seed] = row
    return arms


def tests_of(rows: Sequence[StudyRow]) -> dict[str, dict[int, float]]:
    """`grid/router` -> seed -> bits per byte on the test text."""
    return {f"{g}/{r}": {s: row.test for s, row in arm.items()} for (g, r), arm in arms_of(rows).items()}


def paired(tests: dict[str, dict[int, float]], of: str, minus: str) -> list[float]:
    """The first arm less the second, seed by seed; none where one has not run."""
    first, second = tests.get(of, {}), tests.get(minus, {})
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def contrasts(rows: Sequence[StudyRow], asked: Sequence[Contrast]) -> str:
    """Markdown: a line for each contrast that has the pairs of the first look; empty without one."""
    tests = tests_of(rows)
    found = []
    for contrast in asked:
        differences = paired(tests, contrast.of, contrast.minus)
        if len(differences) >= LOOKS[0]:
            found.append((contrast, differences))
    if not found:
        return ""
    planned = {c.question: dict(enumerate(differences)) for c, differences in found if c.planned}
    # No verdict is taken from it, so the margin is none.
    judged = decide(planned, 0.0, LOOKS, sum(contrast.planned for contrast in asked))
    lines = [
        "**Between other arms.** The first less the second, seed by seed, with 95% t intervals over seeds. Only where "
        f"a p value stands was the difference planned as one; it is over the looks at {LOOKS[0]} and {LOOKS[1]} pairs, "
        "with Holm's correction over the planned.",
        "",
        "| question | first | second | pairs | difference | interval | each pair | p |",
        "|---|---|---|---:|---:|---|---|---:|",
    ]
    for contrast, differences in found:
        interval, _ = t_interval(differences)
        lines.append(
            f"| {contrast.question} | `{contrast.of}` | `{contrast.minus}` | {len(differences)} "
            f"| {np.mean(differences):+.4f} | {interval.low:+.4f} to {interval.high:+.4f} "
            f"| {', '.join(f'{value:+.4f}' for value in differences)} "
            f"| {f'{judged[contrast.question].p_holm:.3f}' if contrast.planned else ''} |"
        )
    return "\n".join(lines) + "\n"


def over_training(rows: Sequence[StudyRow], baseline: str, reference: str) -> str:
    """Markdown: each arm's validation bits less those of its baseline, step by step; empty without two pairs."""
    arms = arms_of(rows)
    cells: dict[tuple[str, str, int], dict[int, str]] = {}
    for (grid, router), mine in arms.items():
        own = home(grid, reference), baseline
        against = {} if (grid, router) == own else arms.get(own, {})
        seeds = sorted(mine.keys() & against.keys())
        if len(seeds) > 1:
            cells[grid, router, len(seeds)] = {
                step: f"{np.mean(values):+.4f} ({np.std(values, ddof=1):.4f})"
                for step, values in _over_steps([(mine[s], against[s]) for s in seeds]).items()
            }
    if not cells:
        return ""
    steps = sorted({step for found in cells.values() for step in found})
    lines = [
        f"**Over training.** Validation bits less those of `{baseline}`, seed by seed: mean, and in brackets the "
        "standard deviation of a pair.",
        "",
        "| grid | router | pairs | " + " | ".join(f"{step:,}" for step in steps) + " |",
        "|---|---|---:|" + "---|" * len(steps),
    ]
    for (grid, router, pairs), found in cells.items():
        shown = " | ".join(found.get(step, "") for step in steps)
        lines.append(f"| {grid} | `{router}` | {pairs} | {shown} |")
    return "\n".join(lines) + "\n"


def _over_steps(pairs: Sequence[tuple[StudyRow, StudyRow]]) -> dict[int, list[float]]:
    """Step -> the pairs' differences, at steps that all of them were evaluated at."""
    curves = [[dict(zip(r.validation.step, r.validation.value, strict=True)) for r in pair] for pair in pairs]
    shared = set.intersection(*(set(curve) for pair in curves for curve in pair))
    return {step: [mine[step] - theirs[step] for mine, theirs in curves] for step in sorted(shared)}


def home(grid: str, reference: str) -> str:
    """The grid whose baseline a grid's arms are compared with."""
    return grid if grid.startswith(OWN_BASELINE) else reference


def _verdicts(
    arms: Arms, baseline: str, margin: float, reference: str, planned: set[tuple[str, str]]
) -> dict[tuple[str, str], Difference]:
    """Arm -> its difference, decided at the fixed looks with Holm's correction over the arms of its baseline."""
    found: dict[tuple[str, str], Difference] = {}
    for at in dict.fromkeys(home(grid, reference) for grid, _ in arms):
        family = {
            f"{grid}/{router}": {seed: row.test for seed, row in mine.items()}
            for (grid, router), mine in arms.items()
            if home(grid, reference) == at
        }
        count = sum(home(grid, reference) == at for grid, _ in planned - {(at, baseline)})
        judged = compare_to_baseline(
            family, f"{at}/{baseline}", "bits_per_byte", "test", margin, looks=LOOKS, planned=count
        )
        found |= {(name.split("/")[0], name.split("/")[1]): difference for name, difference in judged.items()}
    return found


def _line(
    grid: str,
    router: str,
    mine: dict[int, StudyRow],
    against: dict[int, StudyRow],
    margin: float,
    difference: Difference | None,
) -> str:
    scales = [np.mean(row.initial_logits.start) for row in mine.values() if row.initial_logits]
    tests = [row.test for row in mine.values()]
    seeds = sorted(mine.keys() & against.keys())
    averaged = [(mine[s].averaged.test or 0) - (against[s].averaged.test or 0) for s in seeds]
    over_text = text_interval([mine[s].test_losses for s in seeds], [against[s].test_losses for s in seeds])
    cells = [
        grid,
        f"`{router}`",
        f"{np.mean(scales):.2f}" if scales else "",
        str(len(mine)),
        f"{np.mean(tests):.4f}",
        *_judged(difference, margin),
        f"{np.mean(averaged):+.4f}" if averaged else "",
        f"{np.std(averaged, ddof=1):.4f}" if len(averaged) > 1 else "",
        f"{over_text.low:+.4f} to {over_text.high:+.4f}" if over_text else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _judged(difference: Difference | None, margin: float) -> tuple[str, ...]:
    """Mean, interval, standard deviation of a pair, verdict, and the pairs that would see the margin."""
    if difference is None:
        return "", "", "", "", ""
    pairs = len(difference.values)
    verdict = difference.verdict if pairs >= LOOKS[0] else f"{pairs} of {LOOKS[0]} pairs"
    sd = difference.sd
    if sd is None:
        return f"{difference.mean:+.4f}", "", "", verdict, ""
    interval, _ = t_interval(difference.values)  # at 95%; the verdict's own is at the level of its look
    needed = str(seeds_needed(sd, margin) or "over 10,000")
    return (
        f"{difference.mean:+.4f}",
        f"{interval.low:+.4f} to {interval.high:+.4f}",
        f"{sd:.4f}",
        verdict,
        needed,
    )
