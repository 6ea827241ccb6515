"""How the study's finished models route, beside their bits: the paper's claims 7 to 10 at every depth and scale.

    python -m experiments.study routing --data-dir ../shared/data --out runs/study   # results/study_routing.jsonl
    python -m experiments.study table                                                # which stand in results/study.md

Gate entropy and balance are the run's own, measured at its end. The other figures are those of
`experiments.figures.routing`: of the first tokens of the validation split. All are means over layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.figures import Figures, Finished, figures_of
from experiments.lines import read_rows
from experiments.study_rows import StudyRow
from rmoe.compare.statistics import t_interval
from rmoe.records import Record, append_records
from rmoe.results.run import Versions
from rmoe.training.config import RunConfig
from rmoe.training.environment import versions

SHOWN = {
    "mi_over_chance": "mutual information as the paper takes it, over chance, nats",
    "mi_chosen": "mutual information of first choices, nats",
    "entropy": "gate entropy, nats",
    "inner_balance": "inner balance",
    "outer_balance": "outer balance",
    "similarity": "similarity of experts",
}
"""Figure -> its column: claims 7 (two), 8, 9 (two), 10."""


class RoutingRow(Record, frozen=True, kw_only=True):
    """A finished run's figures."""

    grid: str
    router: str
    seed: int
    figures: Figures
    versions: Versions

    @property
    def key(self) -> tuple[str, str, int]:
        return self.grid, self.router, self.seed


def measure_runs(rows: Sequence[StudyRow], data_dir: Path, text: str, out: Path, results: Path) -> int:
    """Measure every finished run in `out` that `results` lacks, and append it; returns how many."""
    known = {row.key for row in read_rows(results, RoutingRow)}
    added = 0
    for row in rows:
        if row.key in known:
            continue
        config = RunConfig.from_dict(row.config).with_setting("data.path", str(data_dir / text))
        run = Finished(out / row.grid / "runs" / row.name, config, data_dir, domains={}, instructions="")
        measured = RoutingRow(
            grid=row.grid,
            router=row.router,
            seed=row.seed,
            figures=figures_of(run, ["routing"]),
            versions=versions(),
        )
        append_records(results, measured)
        print(f"{row.grid} {row.name}", flush=True)
        added += 1
    return added


def own_figures(row: StudyRow) -> Figures:
    """What a run measured itself."""
    measured = {
        "entropy": row.entropy_nats,
        "inner_balance": row.inner_balance,
        "outer_balance": row.outer_balance,
    }
    return {name: float(np.mean(layers)) for name, layers in measured.items() if layers is not None}


def routing_section(
    rows: Sequence[StudyRow], results: Path, baseline: str, home: Callable[[str], str]
) -> str:
    """Markdown: each arm's figures less those of its grid's baseline, paired; empty without a pair.

    Args:
        results: the file of `measure_runs`; runs that are not in it have their own figures alone.
        home: a grid -> the grid whose baseline its own baseline, or its arms if it has none, are compared with.
    """
    arms: dict[tuple[str, str], dict[int, Figures]] = defaultdict(lambda: defaultdict(dict))
    for measured in read_rows(results, RoutingRow):
        arms[measured.grid, measured.router][measured.seed] |= measured.figures
    for row in rows:
        arms[row.grid, row.router][row.seed] |= own_figures(row)
    lines = []
    for (grid, router), mine in sorted(arms.items()):
        own = router != baseline and (grid, baseline) in arms
        base = grid if own else home(grid), baseline
        against = {} if (grid, router) == base else arms.get(base, {})
        seeds = sorted(mine.keys() & against.keys())
        if not seeds:
            continue
        cells = [_cell([mine[s].get(f, np.nan) - against[s].get(f, np.nan) for s in seeds]) for f in SHOWN]
        lines.append(f"| {grid} | `{router}` | {len(seeds)} | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    return "\n".join(
        [
            f"**How they route.** Less the same figure of `{baseline}` in the same grid (of `{baseline}` "
            "itself, at the reference's scale), seed by seed, with 95% t intervals over seeds; means over layers or "
            "pairs of layers, on validation text. A cell of fewer pairs says how many.",
            "",
            "| grid | router | pairs | " + " | ".join(SHOWN.values()) + " |",
            "|---|---|---:|" + "---|" * len(SHOWN),
            *lines,
            "",
        ]
    )


def _cell(differences: Sequence[float]) -> str:
    values = [value for value in differences if not np.isnan(value)]
    if not values:
        return ""
    mean = f"{np.mean(values):+.3g}"
    fewer = f", {len(values)} pairs" if len(values) < len(differences) else ""
    if len(values) < 2:
        return mean + fewer
    interval, _ = t_interval(values)
    return f"{mean} ({interval.low:+.3g} to {interval.high:+.3g}){fewer}"
