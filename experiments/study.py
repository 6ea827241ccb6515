"""The study of text at depth: train its stages in order, collect what is finished, and tabulate it.

    python -m experiments.study run --data-dir ../shared/data --out runs/study
    python -m experiments.study domains --data-dir ../shared/data --out runs/study
    python -m experiments.study collect --out runs/study
    python -m experiments.study branches --data-dir ../shared/data --out runs/study
    python -m experiments.study times --data-dir ../shared/data
    python -m experiments.study routing --data-dir ../shared/data --out runs/study
    python -m experiments.study table

`study.toml` is the plan, `study.md` what was fixed beforehand. `run` trains what is missing, on any machine: what
`results/study.jsonl` has is not trained again. It wants a copy of the code that does not change: runs of two versions
are refused, but for those that were seen to give the same bits (`equal_codes` in `study.toml`, or `--equal-code`).
Another plan (`--plan experiments/zoo.toml`) has results, report and run folders of its own name.
`domains` evaluates finished models on texts they were never trained on. `branches` and `times` are what a comparison
at equal time needs (`experiments.study_time`); `routing` measures how finished models route
(`experiments.study_routing`). `collect` copies finished runs, one line each, into
`results/study.jsonl`; `table` writes `results/study.md` from these files alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch

from experiments.lines import write_table
from experiments.status import exit_status
from experiments.study_domains import evaluate_domains, read_domains
from experiments.study_routing import measure_runs, routing_section
from experiments.study_rows import StudyRow, append_missing, one_code, read_study_rows, study_row
from experiments.study_table import Contrast, contrasts, home, markdown, over_training
from experiments.study_time import section, time_routers, train_branches
from rmoe.compare.engines import EngineConfig, engine_of
from rmoe.compare.jobs import Train
from rmoe.compare.sharing import place
from rmoe.data import prepare
from rmoe.errors import RequestError, RunError
from rmoe.routing.zoo import select
from rmoe.training.build import load_plugins
from rmoe.training.config import RunConfig
from rmoe.training.environment import versions
from rmoe.training.run_folder import read_result

HERE = Path(__file__).parent
PLAN = HERE / "study.toml"
PLUGIN = "experiments/routers.py"  # as seen from the checkout, where this is run
COLLECTED = HERE / "results" / "study.jsonl"
TEXT = "wiki100.txt.gz"


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Routers trained under one configuration: the study's size but for `settings`."""

    folder: str
    routers: list[str]
    settings: dict[str, Any] = {}


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Grids that are trained seed by seed, so that what is finished is whole pairs."""

    name: str
    seeds: int
    grid: list[Grid]


class Study(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`study.toml`, or another plan.

    Attributes:
        contrast: differences between two arms neither of which is the baseline.
        reference: the grid whose baseline the arms of the study's size are compared with.
        equal_codes: versions of the code whose runs have the same bits; see `study.md`.
    """

    margin: float
    baseline: str
    state_width: int
    domains: dict[str, str]
    domain_grids: list[str]
    equal_codes: list[str]
    size: dict[str, dict[str, Any]]
    stage: list[Stage]
    reference: str = "std-1"
    contrast: list[Contrast] = []

    @property
    def grids(self) -> list[Grid]:
        """Of all stages, in order."""
        return [grid for stage in self.stage for grid in stage.grid]

    def config(self, grid: Grid, text: Path) -> RunConfig:
        """The configuration of a grid's runs, but for router and seed."""
        config = RunConfig.from_dict({**self.size, "plugin": [PLUGIN], "preset": "study"})
        config = config.with_setting("data.path", str(text))
        # Together: a shorter run has no room for the branch points of the study's size.
        values = config.to_dict()
        for name, value in grid.settings.items():
            table, _, leaf = name.partition(".")
            values[table][leaf] = value
        return RunConfig.from_dict(values)


def read_study(plan: Path = PLAN) -> Study:
    """The plan, with its routers' names as this width of the state has them.

    What it lacks is that of the plan beside it that it names with `like`.

    Raises:
        RequestError: there is no such plan, or it is none.
    """
    try:
        data = tomllib.loads(plan.read_text(encoding="utf-8"))
        if (like := data.pop("like", None)) is not None:
            data = tomllib.loads((plan.parent / like).read_text(encoding="utf-8")) | data
        study = msgspec.convert(data, Study)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise RequestError("--plan", str(plan), f"a plan as study.toml is ({error})") from None
    return _named(study)


def _named(study: Study) -> Study:
    """With the width of the state for `{p}`."""

    def name(router: str) -> str:
        return router.replace("{p}", str(study.state_width))

    replace = msgspec.structs.replace
    stages = [
        replace(stage, grid=[replace(grid, routers=[name(r) for r in grid.routers]) for grid in stage.grid])
        for stage in study.stage
    ]
    contrasts = [replace(c, of=name(c.of), minus=name(c.minus)) for c in study.contrast]
    arms = {f"{grid.folder}/{router}" for stage in stages for grid in stage.grid for router in grid.routers}
    if unknown := {arm for c in contrasts for arm in (c.of, c.minus)} - arms:
        raise RequestError("contrast", sorted(unknown)[0], f"arms of the plan: {', '.join(sorted(arms))}")
    return replace(study, stage=stages, contrast=contrasts)


def steps(study: Study) -> Iterator[tuple[Grid, int]]:
    """(grid, seeds it is to have) in the order they are trained."""
    for stage in study.stage:
        for seeds in range(1, stage.seeds + 1):
            for grid in stage.grid:
                yield grid, seeds


def run(
    study: Study,
    data_dir: Path,
    out: Path,
    collected: Path = COLLECTED,
    jobs: int = 1,
    most: int | None = None,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Train what neither `out` nor `collected` has, in order.

    Args:
        jobs: runs at once; on a GPU as many share it as `engine.runs_per_gpu` says.
        most: stop after so many turns; None trains all.

    Raises:
        RequestError: this code is not that of the runs so far.
        RunError: a run failed; the others of its step are finished.
    """
    load_plugins((PLUGIN,))
    for grid in study.grids:
        select(grid.routers)
    have = [
        *finished(study, out),
        *(read_study_rows(collected, study.equal_codes) if collected.exists() else []),
    ]
    one_code([*have, versions().code], study.equal_codes)
    for number, runs in enumerate(turns(study, {row.key for row in have}, jobs)):
        if most is not None and number >= most:
            return
        train(study, runs, data_dir, out, jobs, engine)
        for folder in {grid.folder for grid, _, _ in runs}:
            discard_checkpoints(out / folder, study.baseline)


Run: TypeAlias = tuple[Grid, str, int]  # grid, router, seed


def turns(study: Study, known: set[tuple[str, str, int]], jobs: int) -> Iterator[list[Run]]:
    """What is missing, in order: whole steps of the plan, as many together as it takes to keep `jobs` busy."""
    waiting: list[Run] = []
    taken = set(known)
    for grid, seeds in steps(study):
        for seed in range(seeds):
            for router in grid.routers:
                if (key := (grid.folder, router, seed)) not in taken:
                    taken.add(key)
                    waiting.append((grid, router, seed))
        if len(waiting) >= jobs:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def train(
    study: Study, runs: Sequence[Run], data_dir: Path, out: Path, jobs: int, engine: EngineConfig
) -> None:
    """Train runs in their grids' folders, or resume them."""
    configs = {grid.folder: study.config(grid, data_dir / TEXT) for grid, _, _ in runs}
    data = {
        folder: prepare(config.data, config.training.sequence_length).manifest.key
        for folder, config in configs.items()
    }
    work = {
        f"{grid.folder} {router}-seed{seed}": Train(
            config=configs[grid.folder]
            .with_setting("router", router)
            .with_setting("training.seed", seed)
            .to_dict(),
            folder=str(out / grid.folder / "runs" / f"{router}-seed{seed}"),
            data_sha256=data[grid.folder],
        )
        for grid, router, seed in runs
    }
    config = next(iter(configs.values()))  # a plan's grids take the same share of the machine
    on_gpu = torch.cuda.is_available() and config.training.device != "cpu"
    wants, sharing = place(config, engine, jobs, on_gpu)
    with engine_of(engine, out, wants, sharing.jobs, sharing.threads) as carrier:
        errors = []
        for name, answer in carrier.answers(work, wants):
            print(f"{name} {answer.error or 'finished'}", file=sys.stderr, flush=True)
            errors += [f"{name}: {answer.error}"] if answer.error else []
    if errors:
        raise RunError(errors[0], "every other run", "the same command again")


def discard_checkpoints(folder: Path, baseline: str) -> None:
    """Free the disk: of finished runs only the baseline's branch points and the final models are ever read again."""
    for result in folder.glob("runs/*/result.json"):
        kept = result.parent.name.startswith(f"{baseline}-seed")
        for checkpoint in result.parent.glob("checkpoints/checkpoint-*"):
            if not kept or int(checkpoint.name.rpartition("-")[2]) >= last_constant_step(result):
                shutil.rmtree(checkpoint)


def last_constant_step(result: Path) -> int:
    """The step after which checkpoints are of the decay: no run branches from them."""
    config = msgspec.json.decode(result.read_bytes())["config"]
    return int(RunConfig.from_dict(config).training.decay_steps * 4)


def finished(study: Study, out: Path) -> list[StudyRow]:
    """Every finished run of the study's grids, in the order of the plan."""
    folders = dict.fromkeys(grid.folder for grid in study.grids)
    return [
        study_row(folder, read_result(result.parent), read_domains(result.parent))
        for folder in folders
        for result in sorted((out / folder).glob("runs/*/result.json"))
    ]


def reference_config(study: Study, data_dir: Path) -> RunConfig:
    """The configuration of the baseline's runs in the grid that the arms are compared with."""
    grid = next(grid for grid in study.grids if grid.folder == study.reference)
    return study.config(grid, data_dir / TEXT).with_setting("router", study.baseline)


def in_reference(rows: Sequence[StudyRow], study: Study) -> list[StudyRow]:
    """The rows of that grid."""
    return [row for row in rows if row.grid == study.reference]


def beside(results: Path, suffix: str) -> Path:
    """`study.jsonl` -> `study_times.json`: another file of the same plan."""
    return results.with_name(results.stem + suffix)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument(
        "verb", choices=("run", "domains", "branches", "times", "routing", "collect", "table")
    )
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, help="default: runs/ and the plan's name")
    parser.add_argument(
        "--results", type=Path, help="default: results/ and the plan's name, beside this file"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--engine", default="", help="a .toml file with an [engine] table; default: this machine"
    )
    parser.add_argument(
        "--most", type=int, help="stop after so many turns: steps of the plan that keep --jobs busy"
    )
    parser.add_argument(
        "--equal-code",
        action="append",
        default=[],
        help="a version seen to give the bits of the results' own",
    )
    asked = parser.parse_args(argv)

    def work() -> None:
        out = asked.out or Path("runs") / asked.plan.stem
        results = asked.results or COLLECTED.with_stem(asked.plan.stem)
        study = read_study(asked.plan)
        study = msgspec.structs.replace(study, equal_codes=[*study.equal_codes, *asked.equal_code])
        if asked.verb == "run":
            engine = EngineConfig.from_preset(asked.engine)
            run(study, asked.data_dir, out, results, asked.jobs, asked.most, engine)
        elif asked.verb == "domains":
            for row in finished(study, out):
                if row.grid in study.domain_grids:
                    evaluate_domains(out / row.grid / "runs" / row.name, study.domains, asked.data_dir)
        elif asked.verb == "branches":
            config = reference_config(study, asked.data_dir)
            added = train_branches(config, out / study.reference, beside(results, "_branches.jsonl"))
            print(f"{added} shorter runs of {study.baseline} added")
        elif asked.verb == "times":
            load_plugins((PLUGIN,))
            rows = in_reference(read_study_rows(results, study.equal_codes), study)
            routers = dict.fromkeys([study.baseline, *(row.router for row in rows)])
            config = reference_config(study, asked.data_dir)
            timed = time_routers(config, list(routers), beside(results, "_times.json"))
            for router, timing in timed.timings.items():
                print(
                    f"{router} {timing.seconds_per_1k_steps:.1f} s per 1,000 steps, {timing.peak_mib:.0f} MiB"
                )
        elif asked.verb == "routing":
            rows = finished(study, out)
            added = measure_runs(rows, asked.data_dir, TEXT, out, beside(results, "_routing.jsonl"))
            print(f"{added} runs measured")
        elif asked.verb == "collect":
            added = append_missing(results, finished(study, out), study.equal_codes)
            print(f"{added} runs added to {results}")
        else:
            found = read_study_rows(results, study.equal_codes)
            arms = {(grid.folder, router) for grid in study.grids for router in grid.routers}
            table = markdown(found, study.baseline, study.margin, study.reference, asked.plan.name, arms)
            lengths, times = beside(results, "_branches.jsonl"), beside(results, "_times.json")
            at_equal_time = section(in_reference(found, study), study.baseline, study.margin, lengths, times)
            measured = beside(results, "_routing.jsonl")
            routing = routing_section(
                found, measured, study.baseline, lambda grid: home(grid, study.reference)
            )
            training = over_training(found, study.baseline, study.reference)
            between = contrasts(found, study.contrast)
            table = "\n".join(filter(None, (table, between, training, at_equal_time, routing)))
            write_table(results, table)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
