"""The study of text at depth: train its stages in order, collect what is finished, and tabulate it.

    python -m experiments.study run --data-dir ../shared/data --out runs/study
    python -m experiments.study domains --data-dir ../shared/data --out runs/study
    python -m experiments.study collect --out runs/study
    python -m experiments.study table

`study.toml` is the plan, `study.md` what was fixed beforehand. `run` resumes what is missing, from a copy of the code
that never changes: runs of two versions are refused. `domains` evaluates finished models on texts they were never
trained on. `collect` copies finished runs, one line each, into
`results/study.jsonl`; `table` writes `results/study.md` from that file alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from experiments.status import exit_status
from experiments.study_domains import evaluate_domains, read_domains
from experiments.study_rows import StudyRow, append_missing, one_code, read_study_rows, study_row
from experiments.study_table import markdown
from rmoe.compare.compare import Options, compare
from rmoe.compare.engines import EngineConfig
from rmoe.compare.plan import RESULTS
from rmoe.results.rows import ResultRow, read_rows
from rmoe.routing.zoo import select
from rmoe.training.build import load_plugins
from rmoe.training.config import RunConfig
from rmoe.training.environment import versions

HERE = Path(__file__).parent
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
    """`study.toml`."""

    margin: float
    baseline: str
    state_width: int
    domains: dict[str, str]
    domain_grids: list[str]
    size: dict[str, dict[str, Any]]
    stage: list[Stage]

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


def read_study() -> Study:
    """The plan, with its routers' names as this width of the state has them."""
    text = (HERE / "study.toml").read_text(encoding="utf-8")
    width = tomllib.loads(text)["state_width"]
    return msgspec.convert(tomllib.loads(text.replace("{p}", str(width))), Study)


def steps(study: Study) -> Iterator[tuple[Grid, int]]:
    """(grid, seeds it is to have) in the order they are trained."""
    for stage in study.stage:
        for seeds in range(1, stage.seeds + 1):
            for grid in stage.grid:
                yield grid, seeds


def run(
    study: Study, data_dir: Path, out: Path, jobs: int, most: int | None, engine: EngineConfig | None = None
) -> None:
    """Train what is missing, in order.

    Args:
        most: stop after so many steps of the plan that trained something; None trains all.

    Raises:
        RequestError: this code is not that of the runs in `out`.
    """
    load_plugins((PLUGIN,))
    for stage in study.stage:
        for grid in stage.grid:
            select(grid.routers)
    one_code([*finished(study, out), versions().code])
    done = 0
    for grid, seeds in steps(study):
        folder = out / grid.folder
        wanted = {f"{router}-seed{seed}" for router in grid.routers for seed in range(seeds)}
        if wanted <= {row.key for row in rows_of(folder) if row.result}:
            continue
        if most is not None and done >= most:
            return
        done += 1
        options = Options(
            jobs=jobs,
            margin=study.margin,
            timing_rounds=0,
            analysis_tokens=0,
            engine=engine or EngineConfig(),
        )
        compare(study.config(grid, data_dir / TEXT), grid.routers, seeds, folder, options=options)
        discard_checkpoints(folder, study.baseline)


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


def rows_of(folder: Path) -> list[ResultRow]:
    path = folder / RESULTS
    return read_rows(path)[0]


def finished(study: Study, out: Path) -> list[StudyRow]:
    """Every finished run of the study's grids, in the order of the plan."""
    folders = dict.fromkeys(grid.folder for stage in study.stage for grid in stage.grid)
    rows = [(folder, row) for folder in folders for row in rows_of(out / folder) if row.result]
    return [study_row(folder, row, read_domains(out / folder / "runs" / row.key)) for folder, row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a wrong request."""
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__)
    parser.add_argument("verb", choices=("run", "domains", "collect", "table"))
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, default=COLLECTED)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--engine", default="", help="a .toml file with an [engine] table; default: this machine"
    )
    parser.add_argument("--most", type=int, help="stop after so many (grid, seed) steps")
    asked = parser.parse_args(argv)

    def work() -> None:
        study = read_study()
        if asked.verb == "run":
            run(
                study,
                asked.data_dir,
                asked.out,
                asked.jobs,
                asked.most,
                EngineConfig.from_preset(asked.engine),
            )
        elif asked.verb == "domains":
            for row in finished(study, asked.out):
                if row.grid in study.domain_grids:
                    evaluate_domains(asked.out / row.grid / "runs" / row.name, study.domains, asked.data_dir)
        elif asked.verb == "collect":
            added = append_missing(asked.results, finished(study, asked.out))
            print(f"{added} runs added to {asked.results}")
        else:
            table = markdown(read_study_rows(asked.results), study.baseline, study.margin)
            asked.results.with_suffix(".md").write_text(table, encoding="utf-8")
            print(table)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
