"""Decide the statements of `mechanisms.toml` from a probe run's results, and write them as a table.

    python -m experiments.mechanisms runs/probes

Trains nothing: `experiments/README.md` has the commands that make the results. A part is decided by the paired 95% t
interval over its seeds: "seen", the whole interval on the expected side; "not seen", the whole interval on the other
side, or inside the margin; else "not decided". A statement is seen if all its parts are, not seen if any part is not.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from rmoe.compare.statistics import holm, t_interval
from rmoe.results.comparison import Interval
from rmoe.results.probes import Knobs, ProbeRow, knobs_with, read_rows

HERE = Path(__file__).parent
SEEDS = 8  # fewer decide nothing
MEAN = "mean"

Verdict = Literal["seen", "not seen", "not decided", "not run"]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`metric` of the routers in `plus` less that of those in `minus`, paired by seed.

    Attributes:
        probe: a probe, or `mean` over all of them.
        expect: side of zero; `below` and `above` take another bound than zero.
        margin: a difference inside it, whichever side, is none.
    """

    probe: str
    plus: list[str]
    minus: list[str] = []
    metric: str = "regret"
    expect: Literal["lower", "higher"] = "lower"
    below: float | None = None
    above: float | None = None
    margin: float = 0.02


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    says: str
    part: list[Part]


class Statements(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    question: str
    statement: list[Statement]


class Decided(msgspec.Struct, frozen=True):
    """One part's verdict; without `SEEDS` paired runs nothing else."""

    part: Part
    verdict: Verdict
    mean: float | None = None
    interval: Interval | None = None
    p: float | None = None
    p_holm: float | None = None


def statements(path: Path = HERE / "mechanisms.toml") -> Statements:
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Statements)


class Results:
    """Rows by (router, probe, seed, knobs), and what they say by `ROUTER` or `ROUTER@KNOB=VALUE`."""

    def __init__(self, rows: list[ProbeRow]) -> None:
        self.rows = {row.key: row for row in rows}
        self.probes = list(dict.fromkeys(row.probe for row in rows))

    def values(self, term: str, probe: str, metric: str) -> dict[int, float]:
        """Seed -> value; the mean over probes needs every probe."""
        if probe == MEAN:
            found = [self.values(term, one, metric) for one in self.probes]
            shared = set.intersection(*(set(one) for one in found)) if found else set()
            return {seed: float(np.mean([one[seed] for one in found])) for seed in sorted(shared)}
        name, _, change = term.partition("@")
        knobs = knobs_with(dict([change.split("=")])) if change else Knobs()
        return {
            row.seed: float(np.mean(getattr(row, metric)))
            for row in self.rows.values()
            if (row.router, row.probe, row.knobs) == (name, probe, knobs)
        }


def decide(part: Part, results: Results) -> Decided:
    """One part; `p` is of the difference from its bound, before Holm's correction."""
    plus = [results.values(term, part.probe, part.metric) for term in part.plus]
    minus = [results.values(term, part.probe, part.metric) for term in part.minus]
    seeds = sorted(set.intersection(*(set(found) for found in (*plus, *minus))))
    if len(seeds) < SEEDS:
        return Decided(part, "not run")
    bound = next((b for b in (part.below, part.above) if b is not None), 0.0)
    differences = [sum(f[s] for f in plus) - sum(f[s] for f in minus) - bound for s in seeds]
    interval, p = t_interval(differences)
    lower = part.expect == "lower" and part.above is None
    expected = interval.high < 0 if lower else interval.low > 0
    opposite = interval.low > 0 if lower else interval.high < 0
    within = part.metric == "regret" and -part.margin < interval.low and interval.high < part.margin
    verdict: Verdict = "not seen" if opposite or within else "seen" if expected else "not decided"
    return Decided(part, verdict, float(np.mean(differences)) + bound, _moved(interval, bound), p)


def _moved(interval: Interval, by: float) -> Interval:
    return Interval(low=interval.low + by, high=interval.high + by)


def decide_all(found: Statements, results: Results) -> list[tuple[Statement, Verdict, list[Decided]]]:
    """Every statement with its parts, Holm's correction over all parts beside."""
    parts = [[decide(part, results) for part in one.part] for one in found.statement]
    tested = [d for of_one in parts for d in of_one if d.p is not None]
    corrected = dict(zip(map(id, tested), holm([d.p or 0.0 for d in tested]), strict=True))
    parts = [[msgspec.structs.replace(d, p_holm=corrected.get(id(d))) for d in one] for one in parts]
    return [
        (one, _overall([d.verdict for d in of]), of) for one, of in zip(found.statement, parts, strict=True)
    ]


def _overall(verdicts: list[Verdict]) -> Verdict:
    for verdict in ("not run", "not seen", "not decided"):
        if verdict in verdicts:
            return verdict
    return "seen"


def markdown(decided: list[tuple[Statement, Verdict, list[Decided]]]) -> str:
    lines = ["| statement | verdict | difference | 95% interval | p (Holm) |", "|---|---|---:|---:|---:|"]
    for one, verdict, parts in decided:
        lines.append(f"| **{one.says}** | **{verdict}** | | | |")
        lines += [f"| &nbsp; {_phrase(d.part)} | {d.verdict} | {_numbers(d)} |" for d in parts]
    return "\n".join([*lines, ""])


def _phrase(part: Part) -> str:
    metric = "" if part.metric == "regret" else f" {part.metric.replace('_', ' ')}"
    text = f"{part.probe}{metric}: " + " + ".join(part.plus) + "".join(f" - {term}" for term in part.minus)
    if part.below is not None:
        return f"{text}; expected below {part.below:g}"
    return f"{text}; expected {part.expect if part.above is None else f'above {part.above:g}'}"


def _numbers(d: Decided) -> str:
    if d.interval is None or d.mean is None:
        return "| |"
    return f"{d.mean:+.3f} | {d.interval.low:+.3f} to {d.interval.high:+.3f} | {d.p:.2g} ({d.p_holm:.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of results.jsonl")
    parser.add_argument("--out", type=Path, help="write the table there; default: print it")
    given = parser.parse_args()
    rows, problems = read_rows(given.results / "results.jsonl")
    text = markdown(decide_all(statements(), Results(rows)))
    for problem in problems:
        print(f"note: {problem}")
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
