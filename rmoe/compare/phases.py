"""The phases of a comparison once its plan stands: training, the test split, branches, times alone, routing."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from rmoe.compare import plan as plans
from rmoe.compare.engines import Answer, Engine, EngineConfig, Wants
from rmoe.compare.engines.engine import named
from rmoe.compare.engines.fetch import Fetched, unpack
from rmoe.compare.jobs import EvaluateTest, MeasureRouting, Train
from rmoe.compare.plan import ComparisonPlan, Run
from rmoe.compare.progress import Progress
from rmoe.compare.sharing import Sharing
from rmoe.compare.statistics import MARGIN_BITS, stands
from rmoe.compare.summary import chosen_sweep, first_rows, summarise, sweep_points, together
from rmoe.compare.timing import TimeAlone
from rmoe.errors import RunError
from rmoe.records import append_records
from rmoe.report.charts.chart import counted
from rmoe.results.analysis import Analysis, ModelAnalysis, TextInfo, read_analysis, write_analysis
from rmoe.results.rows import Failure, ResultRow, finished, read_rows
from rmoe.results.run import CorpusInfo, Hardware, Versions
from rmoe.routing.zoo import ZOO
from rmoe.training.run_folder import MODEL
from rmoe.validation import require

ANALYSED_AT_MOST = 8  # models in one report: the baseline and those with the lowest loss


@dataclass(frozen=True)
class Options:
    """How a comparison is carried out; none of it changes a run's result.

    Attributes:
        jobs: runs at once; None takes the default for the size.
        margin: half-width of "equivalent", in bits.
        timing_rounds: turns each router gets in the phase that times it alone; 0 leaves it out.
        analysis_tokens: tokens of the validation split whose routing is measured; 0 leaves that out.
        single_file: inline the plotting library into the report.
        engine: where the runs are carried out.
    """

    jobs: int | None = None
    margin: float = MARGIN_BITS
    timing_rounds: int = 3
    analysis_tokens: int = 65_536
    single_file: bool = False
    engine: EngineConfig = EngineConfig()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        require(0 <= self.margin < math.inf, "--margin", self.margin, "0 or more, and finite")
        require(self.timing_rounds >= 0, "--timing-rounds", self.timing_rounds, "0 or more")
        require(self.analysis_tokens >= 0, "--analysis-tokens", self.analysis_tokens, "0 or more")


@dataclass(frozen=True)
class Setting:
    """What all phases of one comparison share."""

    plan: ComparisonPlan
    out: Path
    sharing: Sharing
    options: Options
    corpus: CorpusInfo
    versions: Versions
    hardware: Hardware
    wants: Wants

    @property
    def one(self) -> Wants:
        """What a job of one process needs."""
        return replace(self.wants, gpus=min(self.wants.gpus, 1), processes=1)

    @property
    def results(self) -> Path:
        return self.out / plans.RESULTS

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.key

    def rows(self) -> dict[str, ResultRow]:
        return {row.key: row for row in read_rows(self.results)[0]}


def train_until_decided(setting: Setting, engine: Engine) -> Setting:
    """Train what is missing; with looks, one pair more of every undecided router at each.

    Which router stops when follows from the rows alone, so an interrupted comparison comes to the same runs. A router
    that gains no pair at a look, as its runs fail, gets no more; a failed run is started once in a call.

    Returns:
        The setting with the plan of what was trained.
    """
    looks = setting.plan.looks
    if looks is None:
        _train_missing(setting, engine)
        return setting
    tried, before = set[str](), 0
    for pairs in looks:
        setting = replace(setting, plan=replace(setting.plan, seeds=pairs))
        _train_missing(setting, engine, tried)
        failing = _without_new_pair(setting, before)
        if failing:
            print(f"no more pairs, as runs fail: {', '.join(failing)}", file=sys.stderr, flush=True)
        before = pairs
        decided = dict.fromkeys(failing, pairs) | _decided(setting, pairs)
        setting = replace(setting, plan=replace(setting.plan, decided=decided | setting.plan.decided))
        undecided = set(setting.plan.routers) - {setting.plan.baseline} - set(setting.plan.decided)
        if not undecided or setting.plan.baseline in failing:
            break
        print(f"after {pairs} pairs not decided: {', '.join(sorted(undecided))}", file=sys.stderr, flush=True)
    return setting


def _without_new_pair(setting: Setting, before: int) -> list[str]:
    """Routers that were to get pairs beyond the first `before` and finished none of these runs."""
    known, first = finished(setting.rows().values()), setting.plan.config.training.seed
    newer = [run for run in setting.plan.runs() if run.seed - first >= before]
    gained = {run.router for run in newer if run.key in known}
    return [router for router in dict.fromkeys(run.router for run in newer) if router not in gained]


def _decided(setting: Setting, pairs: int) -> dict[str, int]:
    """Routers whose verdict stands after so many pairs."""
    rows = planned_rows(setting)[0]
    if not finished(rows):
        return {}
    plan = setting.plan
    planned, margin = len(plan.routers) - 1, setting.options.margin
    summary = summarise(rows, "", plan.baseline, margin=margin, looks=plan.looks, planned=planned)
    return {r.router: pairs for r in summary.routers if r.difference is not None and stands(r.difference)}


def planned_rows(setting: Setting) -> tuple[list[ResultRow], list[str]]:
    """The rows that count: those of the plan, and without looks earlier finished runs of the folder too."""
    rows, problems = read_rows(setting.results)
    keys, earlier = {run.key for run in setting.plan.runs()}, setting.plan.looks is None
    rows = [row for row in rows if row.key in keys or (earlier and row.failure is None)]
    return rows, problems


def _train_missing(setting: Setting, engine: Engine, tried: set[str] | None = None) -> None:
    """Train every run that has no finished row.

    Args:
        tried: keys of runs that are not started again; what is started now is added.
    """
    tried = set() if tried is None else tried
    known = finished(setting.rows().values()).keys() | tried
    missing = [(run, setting.folder(run), None) for run in setting.plan.runs() if run.key not in known]
    tried.update(run.key for run, _, _ in missing)
    threads = counted([setting.sharing.threads], "thread")
    if missing:
        said = f"{counted([len(missing)], 'run')}, {engine.at_once} with {threads} each; logs in {setting.out / 'logs'}"
        _train(setting, engine, setting.results, missing, said)


def train_branches(setting: Setting, engine: Engine) -> None:
    """Train the baseline's shorter runs that are missing, each from its longer run's checkpoint."""
    path = setting.out / plans.BRANCHES
    known, whole = finished(read_rows(path)[0]), finished(setting.rows().values())
    missing = [
        (branch, setting.out / "branches" / branch.key, setting.folder(run))
        for branch, run in setting.plan.branches()
        if branch.key not in known and run.key in whole
    ]
    if missing:
        said = f"{counted([len(missing)], 'branch')} of {setting.plan.baseline} ..."
        _train(setting, engine, path, missing, said)


def _train(
    setting: Setting,
    engine: Engine,
    path: Path,
    missing: Sequence[tuple[Run, Path, Path | None]],
    said: str,
) -> None:
    """Train runs, several at once, and append a row of each to `path`.

    Args:
        missing: each run, its folder, and that of the longer run it branches from.

    Raises:
        RunError: somebody told a run to stop.
    """
    print(f"training {said}", file=sys.stderr, flush=True)
    runs = {run.key: run for run, _, _ in missing}
    jobs = {
        run.key: Train(
            config=run.config.to_dict(),
            folder=str(folder),
            data_sha256=setting.corpus.sha256,
            branch_of=None if longer is None else str(longer),
        )
        for run, folder, longer in missing
    }
    with Progress(
        {run.key: (folder, run.config.training.max_steps) for run, folder, _ in missing}
    ) as progress:
        for key, answer in _trained(setting, engine, jobs):
            if answer.stopped:
                raise RunError(f"{key}: {answer.error}", "every finished run", "run the same command again")
            append_records(path, _row(setting, runs[key], answer))
            progress.finished(key, answer.error)


def _trained(setting: Setting, engine: Engine, jobs: Mapping[str, Train]) -> Iterator[tuple[str, Answer]]:
    """Answers of training jobs; without a shared folder the runs' own come with them."""
    what = setting.options.engine.fetch
    if what == "no":
        yield from engine.answers(jobs, setting.wants)
        return
    fetched = {name: Fetched(job=job, what=what) for name, job in jobs.items()}
    for name, answer in engine.answers(fetched, setting.wants):
        if answer.error is None:
            result, files = answer.value
            unpack(files, Path(jobs[name].folder))
            model = str(Path(jobs[name].folder, MODEL)) if what == "model" else None
            place = {"folder": jobs[name].folder, "model": model}
            answer = msgspec.structs.replace(answer, value=msgspec.structs.replace(result, **place))
        yield name, answer


def _row(setting: Setting, run: Run, answer: Answer) -> ResultRow:
    """The line of results.jsonl that an answer makes."""
    failure = None
    if answer.error is not None:
        failure = Failure(
            error=answer.error,
            router_spec=ZOO[run.router].spec.to_dict(),
            config=run.config.to_dict(),
            versions=setting.versions,
            hardware=setting.hardware,
            corpus=setting.corpus,
        )
    return ResultRow(router=run.router, seed=run.seed, sweep=run.sweep, result=answer.value, failure=failure)


def evaluate_chosen(setting: Setting, engine: Engine) -> None:
    """With a sweep: the test split, once, for the point each router does best at on validation."""
    if not setting.plan.sweep:
        return
    rows = {row.key: row for row in planned_rows(setting)[0]}
    results = finished(rows.values())
    chosen = chosen_sweep(sweep_points(list(rows.values())))
    configs = _configs(setting.plan)
    jobs = {
        key: EvaluateTest(config=configs.get(key, result.config), folder=str(setting.out / "runs" / key))
        for key, result in results.items()
        if rows[key].sweep == chosen.get(rows[key].router) and result.test is None
    }
    for key, answer in engine.answers(jobs, setting.one):
        if answer.error is not None:
            raise RunError(
                f"evaluating {key} on the test split failed: {answer.error}",
                "every run",
                "run the same command again",
            )
        result = msgspec.structs.replace(results[key], test=answer.value)
        append_records(setting.results, msgspec.structs.replace(rows[key], result=result))


def time_each_alone(setting: Setting, engine: Engine) -> None:
    """Time and memory of every router, one at a time, in turns, on one machine; kept with the router's first run.

    Routers that were timed in another session are timed again with the new ones, those that are not asked for now
    too: values of one table come from one phase and one machine.
    """
    if not setting.options.timing_rounds:
        return
    rows = first_rows(planned_rows(setting)[0])
    if together(rows.values()):
        return
    print("timing each router alone ...", file=sys.stderr, flush=True)
    configs = _configs(setting.plan)
    job = TimeAlone(
        configs={router: configs.get(row.key, row.run.config) for router, row in rows.items()},
        threads=setting.sharing.threads,
        processes=setting.wants.processes,
        rounds=setting.options.timing_rounds,
        logs=str(setting.out / "logs"),
    )
    wants = replace(setting.wants, processes=1, node=setting.options.engine.node, alone=True)
    for _, answer in engine.answers({named("timing", job.configs, job.rounds): job}, wants):
        if answer.error is not None:
            raise RunError(answer.error, "every run", "run the same command again, or with --timing-rounds 0")
        for router, timing in answer.value.items():
            append_records(setting.results, msgspec.structs.replace(rows[router], timing=timing))


def _configs(plan: ComparisonPlan) -> dict[str, dict[str, Any]]:
    """Key -> configuration of the plan's own runs, whose text may lie elsewhere than that of earlier ones."""
    return {run.key: run.config.to_dict() for run in plan.runs()}


def analyse(setting: Setting, engine: Engine) -> Analysis | None:
    """Measure the routing of each router's first run; `analysis.json`."""
    if not setting.options.analysis_tokens or setting.options.engine.fetch == "result":
        return None
    path = setting.out / plans.ANALYSIS
    configs = _configs(setting.plan)
    rows = first_rows(planned_rows(setting)[0], configs)

    def rank(name: str) -> tuple[bool, float]:
        result = rows[name].result
        loss = None if result is None else result.val
        return name != setting.plan.baseline, math.inf if loss is None else loss

    ranked = sorted(rows, key=rank)
    wanted = ranked[:ANALYSED_AT_MOST]
    keys = ", ".join(rows[name].key for name in wanted)
    what = f"Analysed: {keys}; at most {setting.options.analysis_tokens:,} tokens each."
    if len(ranked) > len(wanted):
        first = f"{setting.plan.baseline} and " if setting.plan.baseline in wanted else ""
        what += f" These are {first}the {len(wanted) - bool(first)} routers with the lowest loss."
    if path.exists():
        known = read_analysis(path)
        if [m.name for m in known.models] == wanted and what in known.notes:
            return known
    print("measuring how each router routes ...", file=sys.stderr, flush=True)
    found: dict[str, ModelAnalysis] = {}
    notes = [what]
    jobs = {
        name: MeasureRouting(
            config=configs[rows[name].key],
            folder=str(setting.out / "runs" / rows[name].key),
            name=name,
            tokens=setting.options.analysis_tokens,
        )
        for name in wanted
    }
    by_job = {named(f"{name}-routing", job.config, job.tokens): name for name, job in jobs.items()}
    for job, answer in engine.answers({job: jobs[name] for job, name in by_job.items()}, setting.one):
        name = by_job[job]
        if answer.error is not None:
            notes.append(f"{name} could not be analysed: {answer.error}")
        else:
            found[name] = answer.value
    if not found:
        return None
    analysis = Analysis(
        text=TextInfo(
            name=f"{setting.corpus.name}, validation split",
            sha256=setting.corpus.sha256,
            tokens=max((m.entropy.n for m in found.values() if m.entropy), default=0),
        ),
        models=[found[name] for name in wanted if name in found],
        notes=notes,
    )
    write_analysis(path, analysis)
    return analysis
