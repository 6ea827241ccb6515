"""Carry out experiments: train what is missing, measure, judge, and write tables.

    python -m experiments.run [NAME ...] --data-dir ../shared/data --out runs/experiments

An experiment is `experiments/NAME.toml`: which routers are trained, and statements about their figures with what
would make each true. Runs that two experiments share are trained once. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from experiments.figures import Figures, Finished, figures_of
from experiments.status import exit_status
from rmoe.compare import statistics
from rmoe.compare.compare import Options, compare
from rmoe.compare.engines import EngineConfig
from rmoe.errors import RequestError
from rmoe.results.comparison import Interval
from rmoe.results.rows import finished, read_rows, run_key
from rmoe.routing.zoo import select
from rmoe.training.build import load_plugins
from rmoe.training.config import RunConfig
from rmoe.training.environment import hardware, versions

HERE = Path(__file__).parent
NAMES = ("claims", "phases", "recurrence", "domains", "temperature")
PLUGIN = "experiments/routers.py"  # as seen from the checkout, where `python -m experiments.run` is run
STATE_WIDTH = {"cpu": 32, "gpu": 128}  # `{p}` in an experiment's routers

Verdict = Literal["seen", "not seen", "not decided"]


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Runs to train: routers x seeds, with the size file's settings but for `settings`."""

    routers: list[str]
    folder: str = "main"
    seeds: int = 3
    settings: dict[str, Any] = {}


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One paired difference: `figure` of `router` less that of `against`, and what is expected of it.

    Attributes:
        against_figure: of `against`; None is `figure`.
        grid, against_grid: where the two were trained; None is `grid`.
        beyond: the same difference in this grid is taken off first: a difference of differences.
        expect: `lower`, `higher`, or `same`: within `margin` either way.
        margin: in the figure's unit.
    """

    figure: str
    router: str
    against: str = "smoe"
    against_figure: str | None = None
    expect: Literal["lower", "higher", "same"] = "lower"
    margin: float = 0.01
    grid: str = "main"
    beyond: str | None = None


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is claimed. `undecidable`: declared before the first run, why this size cannot tell."""

    says: str
    part: list[Part] = []
    undecidable: str = ""


class Experiment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`NAME.toml`. `families`: what is measured of its runs; `table`: figures shown for every router of every grid."""

    question: str
    families: list[str]
    table: list[str]
    grid: list[Grid]
    statement: list[Statement]
    domains: dict[str, str] = {}
    instructions: str = "tasks/rasbt_instruction_1100.jsonl.gz"


class Judged(msgspec.Struct, frozen=True):
    """A part, measured."""

    part: Part
    differences: dict[int, float]  # by seed
    mean: float
    interval: Interval
    p: float
    p_holm: float  # over all parts of the experiment
    verdict: Verdict


@dataclass(frozen=True)
class Workplace:
    """Where an experiment is carried out."""

    size: str
    text: Path
    data_dir: Path
    out: Path
    jobs: int | None
    engine: EngineConfig = EngineConfig()  # noqa: RUF009  frozen

    def config(self, grid: Grid) -> RunConfig:
        config = RunConfig.from_preset(str(HERE / f"size-{self.size}.toml"))
        config = config.with_setting("plugin", [PLUGIN])
        config = config.with_setting("data.path", str(self.text))
        for name, value in grid.settings.items():
            config = config.with_setting(name, value)
        return config


def read(name: str, size: str) -> Experiment:
    """An experiment with its routers' names as this size has them."""
    text = (HERE / f"{name}.toml").read_text(encoding="utf-8").replace("{p}", str(STATE_WIDTH[size]))
    return msgspec.convert(tomllib.loads(text), Experiment)


def require_whole(name: str, experiment: Experiment) -> None:
    """Before anything is trained: every router exists, and every part names routers that its grids train.

    Raises:
        RequestError: one does not.
    """
    load_plugins((PLUGIN,))
    trained = {grid.folder: set(select(grid.routers)) for grid in experiment.grid}
    for part in (part for one in experiment.statement for part in one.part):
        for grid in filter(None, (part.grid, part.beyond)):
            for router in (part.router, part.against):
                if router not in trained.get(grid, ()):
                    raise RequestError(
                        f"{name}: part", f"{router} in {grid}", "a router that the grid trains"
                    )


def train(grid: Grid, place: Workplace) -> dict[str, dict[int, Path]]:
    """Train what is missing of a grid; router -> seed -> the run's folder."""
    folder, config = place.out / grid.folder, place.config(grid)
    first = config.training.seed
    runs = {
        router: {
            seed: folder / "runs" / run_key(router, seed, {}) for seed in range(first, first + grid.seeds)
        }
        for router in grid.routers
    }
    results = folder / "results.jsonl"
    rows = read_rows(results)[0]
    if not finished(rows).keys() >= {path.name for by_seed in runs.values() for path in by_seed.values()}:
        options = Options(jobs=place.jobs, timing_rounds=0, analysis_tokens=0, engine=place.engine)
        compare(config, grid.routers, grid.seeds, folder, options=options)
    return runs


Measured = dict[str, dict[str, dict[int, Figures]]]  # grid -> router -> seed -> figures


def measure(experiment: Experiment, place: Workplace) -> Measured:
    """Every figure the experiment asks for."""
    measured: Measured = {}
    for grid in experiment.grid:
        config = place.config(grid)
        for router, by_seed in train(grid, place).items():
            for seed, folder in by_seed.items():
                run = Finished(
                    folder=folder,
                    config=config.with_setting("router", router).with_setting("training.seed", seed),
                    data_dir=place.data_dir,
                    domains=experiment.domains,
                    instructions=experiment.instructions,
                )
                print(f"{grid.folder}: {folder.name}", file=sys.stderr, flush=True)
                families = [one for one in experiment.families if applies(one, router, grid)]
                measured.setdefault(grid.folder, {}).setdefault(router, {})[seed] = figures_of(run, families)
    return measured


def applies(family: str, router: str, grid: Grid) -> bool:
    """Gradients over training need a grid that keeps its checkpoints; fine-tuning is asked of RMoE alone."""
    if family == "gradients":
        return "checkpoints.keep" in grid.settings
    if family == "frozen":
        return router.startswith("rmoe-p") and grid.folder == "main"
    return True


def differences(part: Part, measured: Measured) -> dict[int, float]:
    """Seed -> difference, over the seeds both finished."""

    def in_grid(grid: str) -> dict[int, float]:
        ours, theirs = measured[grid][part.router], measured[grid][part.against]
        other = part.against_figure or part.figure
        return {seed: ours[seed][part.figure] - theirs[seed][other] for seed in ours.keys() & theirs.keys()}

    found = in_grid(part.grid)
    if part.beyond is not None:
        base = in_grid(part.beyond)
        found = {seed: found[seed] - base[seed] for seed in found.keys() & base.keys()}
    return dict(sorted(found.items()))


def verdict(part: Part, interval: Interval) -> Verdict:
    """By the 95% interval alone: `same` is decided by equivalence, a direction by the sign of the whole interval.

    >>> verdict(Part("loss", "rmoe"), Interval(low=-0.03, high=-0.01))
    'seen'
    >>> verdict(Part("loss", "rmoe"), Interval(low=-0.03, high=0.01))
    'not decided'
    >>> verdict(Part("loss", "rmoe", margin=0.01), Interval(low=-0.004, high=0.004))
    'not seen'
    >>> verdict(Part("loss", "rmoe", expect="same"), Interval(low=0.02, high=0.04))
    'not seen'
    """
    low, high = (-interval.high, -interval.low) if part.expect == "higher" else (interval.low, interval.high)
    within = -part.margin < low and high < part.margin
    if part.expect == "same":
        return "seen" if within else "not seen" if low > part.margin or high < -part.margin else "not decided"
    return "seen" if high < 0 else "not seen" if low > 0 or within else "not decided"


def judge(experiment: Experiment, measured: Measured) -> list[list[Judged]]:
    """Per statement, its parts."""
    found = [[differences(part, measured) for part in one.part] for one in experiment.statement]
    tests = [[statistics.t_interval(list(one.values())) for one in parts] for parts in found]
    adjusted = iter(statistics.holm([p for parts in tests for _, p in parts]))
    return [
        [
            Judged(
                part=part,
                differences=by_seed,
                mean=sum(by_seed.values()) / len(by_seed),
                interval=interval,
                p=p,
                p_holm=next(adjusted),
                verdict=verdict(part, interval),
            )
            for part, by_seed, (interval, p) in zip(one.part, parts, tested, strict=True)
        ]
        for one, parts, tested in zip(experiment.statement, found, tests, strict=True)
    ]


def together(parts: Sequence[Judged]) -> Verdict:
    """A statement is seen when each part is, and not seen when one is not."""
    verdicts = {one.verdict for one in parts}
    if "not seen" in verdicts:
        return "not seen"
    return "seen" if verdicts == {"seen"} else "not decided"


def tables(experiment: Experiment, measured: Measured, judged: list[list[Judged]], header: str) -> str:
    """Markdown: statements with their intervals, then every router's figures."""
    lines = [
        header,
        "",
        "| statement | verdict | difference | 95% interval | p (Holm) |",
        "|---|---|---|---|---|",
    ]
    for one, parts in zip(experiment.statement, judged, strict=True):
        said = f"not decided, as declared: {one.undecidable}" if one.undecidable else f"**{together(parts)}**"
        lines.append(f"| {one.says} | {said} | | | |")
        for part in parts:
            lines.append(
                f"| &nbsp; {describe(part.part)} | {part.verdict} | {part.mean:+.4f} "
                f"| {part.interval.low:+.4f} to {part.interval.high:+.4f} | {part.p:.3f} ({part.p_holm:.3f}) |"
            )
    for grid, routers in measured.items():
        shown = [
            name
            for name in experiment.table
            if any(name in figures for by_seed in routers.values() for figures in by_seed.values())
        ]
        if not shown:
            continue
        lines += [
            "",
            f"Grid `{grid}`, mean ± standard deviation over seeds:",
            "",
            f"| router | {' | '.join(shown)} |",
            "|---|" + "---:|" * len(shown),
        ]
        for router, by_seed in routers.items():
            cells = []
            for name in shown:
                spread = statistics.spread({s: f[name] for s, f in by_seed.items() if name in f})
                cells.append("" if spread is None else f"{spread.mean:.4f} ± {spread.sd or 0:.4f}")
            lines.append(f"| {router} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(part: Part) -> str:
    """What is subtracted from what."""
    other = "" if part.against_figure is None else f"{part.against_figure} of "
    said = f"{part.figure}: {part.router} - {other}{part.against}"
    if part.grid != "main":
        said += f", in {part.grid}"
    if part.beyond is not None:
        said += f", less the same in {part.beyond}"
    return f"{said}; expected {part.expect}" + (f" within {part.margin:g}" if part.expect == "same" else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--size", choices=tuple(STATE_WIDTH), default="cpu")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--text", default="wiki100.txt.gz", help="in --data-dir, what is trained on")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "early")
    parser.add_argument("--jobs", type=int)
    parser.add_argument(
        "--engine", default="", help="a .toml file with an [engine] table; default: this machine"
    )
    asked = parser.parse_args(argv)

    def work() -> None:
        engine = EngineConfig.from_preset(asked.engine)
        place = Workplace(
            asked.size, asked.data_dir / asked.text, asked.data_dir, asked.out, asked.jobs, engine
        )
        if unknown := set(asked.names) - set(NAMES):
            raise RequestError("NAME", ", ".join(sorted(unknown)), f"one of {', '.join(NAMES)}")
        for name in asked.names:
            require_whole(name, read(name, place.size))
        for name in asked.names:
            carry_out(name, place, asked.results)

    return exit_status(work)


def carry_out(name: str, place: Workplace, results: Path) -> None:
    """One experiment from its TOML to its tables."""
    experiment = read(name, place.size)
    measured = measure(experiment, place)
    judged = judge(experiment, measured)
    training = place.config(experiment.grid[0]).training
    machine, software = hardware(training.threads or 1, training.device), versions()
    header = (
        f"Size `{place.size}`, text `{place.text.name}`; {machine.cpu}, {machine.threads} thread(s) a run"
        f"{'' if machine.accelerator is None else ', ' + machine.accelerator}; "
        f"code {software.code}, " + ", ".join(f"{k} {v}" for k, v in software.libraries.items())
    )
    results.mkdir(parents=True, exist_ok=True)
    table = tables(experiment, measured, judged, header)
    (results / f"{name}-{place.size}.md").write_text(table, encoding="utf-8")
    whole = {
        "experiment": experiment,
        "size": place.size,
        "hardware": machine,
        "versions": software,
        "figures": measured,
        "judged": judged,
    }
    encoded = msgspec.json.format(msgspec.json.encode(whole), indent=1)
    (results / f"{name}-{place.size}.json").write_bytes(encoded)
    print(table)


if __name__ == "__main__":
    sys.exit(main())
