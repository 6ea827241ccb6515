"""`compare`: trains what is missing of a grid, judges it, and writes table and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from rmoe.compare import plan as plans
from rmoe.compare.equal_time import with_branch_points
from rmoe.compare.gate import gated, read_other
from rmoe.compare.jobs import Answer, Judge, Measure, Train
from rmoe.compare.plan import Plan, Run
from rmoe.compare.pool import Pool
from rmoe.compare.progress import Progress
from rmoe.compare.schema import ResultRow, Summary, append_row, read_rows
from rmoe.compare.sharing import Sharing, share
from rmoe.compare.statistics import MARGIN_BITS
from rmoe.compare.summary import chosen_sweep, summarise, sweep_points
from rmoe.compare.timing import time_alone
from rmoe.errors import RequestError, RunError
from rmoe.places import require_writable
from rmoe.records import write_record
from rmoe.report import table
from rmoe.report.analysis_schema import Analysis, ModelAnalysis, Text, read_analysis, write_analysis
from rmoe.report.charts.chart import counted
from rmoe.report.page import write_report
from rmoe.routing.zoo import ZOO, select
from rmoe.training.config import RunConfig
from rmoe.training.result import Corpus, Hardware, RunResult, Versions

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
    """

    jobs: int | None = None
    margin: float = MARGIN_BITS
    timing_rounds: int = 3
    analysis_tokens: int = 65_536
    single_file: bool = False


@dataclass(frozen=True)
class _Setting:
    """What all phases of one comparison share."""

    plan: Plan
    out: Path
    sharing: Sharing
    options: Options
    corpus: Corpus
    versions: Versions
    hardware: Hardware

    @property
    def results(self) -> Path:
        return self.out / plans.RESULTS

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.key

    def rows(self) -> dict[str, ResultRow]:
        return {row.key: row for row in read_rows(self.results)[0]} if self.results.exists() else {}


def compare(
    config: RunConfig,
    routers: Sequence[str],
    seeds: int,
    out: Path,
    *,
    baseline: str | None = None,
    sweep: Sequence[str] = (),
    match_params: bool = False,
    match_logits: float | None = None,
    max_seeds: int | None = None,
    lengths: Sequence[int] = (),
    gate: Path | None = None,
    options: Options | None = None,
) -> Summary:
    """Train every router with every seed, go on with what is missing, and judge.

    Args:
        config: of every run, but for the router; its seed is the first of `seeds`.
        routers: names of the zoo or of plugins; `all` is the whole zoo.
        seeds: runs per router (and sweep point), paired: run s of every router has the same seed.
        out: a new folder, or that of the same comparison.
        baseline: what the others are judged against; `smoe` where it is compared, else the first router.
        sweep: `SETTING=VALUE,VALUE,...`; each router gets its own value, chosen on validation with equal budgets, and
            the test split is evaluated once, for what was chosen.
        match_params: give every router the baseline's number of parameters; see `rmoe.compare.match`.
        match_logits: start every router's raw logits at this standard deviation; see `rmoe.training.initial_scale`.
        max_seeds: add pairs, from `seeds` to so many, until every verdict stands; a decided router gets no more. None
            trains `seeds` and looks once.
        lengths: two shorter lengths of the baseline, branched from its `wsd` runs: with the times of the phase run
            alone they give bits at equal seconds; see `rmoe.compare.equal_time`.
        gate: folder of a comparison at another size: a router passes when it is better at both.
        options: how it is carried out.

    Returns:
        The summary, also written with `summary.md` and `report/index.html`.

    Raises:
        RequestError: the request is wrong; nothing was written.
        RunError: interrupted, or no run of a router finished; the same command goes on.
    """
    options = options or Options()
    require_writable(out)
    if lengths:
        config = with_branch_points(config, lengths)
    if match_logits is not None:
        config = config.with_setting("training.initial_logit_std", match_logits)
    plan = replace(
        _plan(config, routers, seeds, baseline, sweep, max_seeds), lengths=tuple(sorted(set(lengths)))
    )
    other = None if gate is None else read_other(gate, plan)
    setting, notes = _set_up(plan, out, match_params, options)
    try:
        with Pool(setting.sharing.jobs, setting.sharing.threads, out / "logs") as pool:
            setting = _train_until_decided(setting, pool)
            _judge_chosen(setting, pool)
            _train_branches(setting, pool)
            _time_alone(setting)
            analysis = _analyse(setting, pool)
    except KeyboardInterrupt:
        runs = f"{len(setting.rows())} of {len(setting.plan.runs())} runs"
        saved = f"{runs}, and checkpoints of those under way, in {out}"
        raise RunError("interrupted", saved, "run the same command again") from None
    rows, problems = _planned_rows(setting)
    if not any(row.status == "finished" for row in rows):
        raise RunError(
            f"every run failed, {rows[0].key} with: {rows[0].error}", "no model", f"see {out / 'logs'}"
        )
    summary = summarise(
        rows,
        preset=config.preset,
        baseline=setting.plan.baseline,
        descriptions={name: row.summary for name, row in ZOO.items()},
        notes=[*notes, *problems],
        margin=options.margin,
        looks=setting.plan.looks,
        branches=read_rows(out / plans.BRANCHES)[0] if (out / plans.BRANCHES).exists() else [],
    )
    if other is not None:
        summary = gated(summary, other)
    write_record(out / plans.SUMMARY, summary)
    (out / "summary.md").write_text(table.markdown(summary), encoding="utf-8")
    write_report(out / "report", summary, analysis, single_file=options.single_file)
    return summary


# --- before anything is trained ------------------------------------------------------------------


def _plan(
    config: RunConfig,
    routers: Sequence[str],
    seeds: int,
    baseline: str | None,
    sweep: Sequence[str],
    max_seeds: int | None,
) -> Plan:
    if seeds < 1:
        raise RequestError("--seeds", seeds, "1 or more")
    if max_seeds is not None:
        if seeds < 2:
            raise RequestError("--seeds", seeds, "2 or more with --until-decided: one pair has no spread")
        if max_seeds < seeds:
            raise RequestError("--max-seeds", max_seeds, f"--seeds ({seeds}) or more")
        if sweep:
            raise RequestError(
                "--until-decided", True, "left out with --sweep: the choice would change as pairs come"
            )
    if config.router != RunConfig.router:
        raise RequestError("--router", config.router, "left alone: --routers says what is compared")
    from rmoe.training.build import load_plugins

    load_plugins(config.plugin)
    names = select(routers)
    baseline = baseline or ("smoe" if "smoe" in names else names[0])
    if baseline not in names:
        raise RequestError("--baseline", baseline, f"one of the routers compared: {', '.join(names)}")
    return Plan(
        config=config.with_setting("router", baseline),
        routers=names,
        seeds=seeds,
        baseline=baseline,
        sweep=plans.parse_sweep(config, sweep),
        changes=plans.only_k(names, config),
        optional=frozenset(names) - {*routers, baseline},
        looks=None if max_seeds is None else tuple(range(seeds, max_seeds + 1)),
    )


def _set_up(plan: Plan, out: Path, match_params: bool, options: Options) -> tuple[_Setting, list[str]]:
    """Prepare the text once for all workers, refuse what cannot work, take the folder."""
    import torch

    from rmoe.data import prepare
    from rmoe.training.environment import hardware, versions

    training = plan.config.training
    on_gpu = torch.cuda.is_available() and training.device != "cpu"
    if options.jobs is not None and options.jobs < 1:
        raise RequestError("--jobs", options.jobs, "1 or more")
    sharing = share(plan.config.model, training, options.jobs, on_gpu)
    plan = plans.with_threads(plan, sharing.threads)
    prepared = prepare(plan.config.data, training.sequence_length)
    for split in ("train", "valid", "test"):
        if split not in prepared.manifest.splits:
            raise RequestError("data.split", plan.config.data.split, f"a rule that gives a {split} split")
    corpus = Corpus(name=prepared.manifest.source.name, sha256=prepared.manifest.key, unit=prepared.unit)
    notes = [
        f"{name} runs with {change['model.num_experts_per_tok']} expert(s) per token, the only number it is "
        "defined for: it is no like-for-like comparison."
        for name, change in plan.changes.items()
    ]
    plan, said = _buildable(plan, prepared.vocab_size)
    notes += said
    if match_params:
        plan, said = _matched(plan, prepared.vocab_size)
        notes += said
    if plan.config.preset == "quick":
        notes.append(
            "At the size of the quick preset no router is expected to win; the paper's small model saw none."
        )
    plans.enter(out, plan, corpus.sha256)
    setting = _Setting(plan, out, sharing, options, corpus, versions(), hardware(sharing.threads))
    setting.rows()  # a results.jsonl of another version is refused before anything is trained
    return setting, notes


def _count(config: RunConfig, vocab_size: int) -> int:
    """Non-embedding parameters of a configuration, without allocating them.

    Raises:
        RequestError: the router cannot work in this model.
    """
    import torch

    from rmoe.model import RMoEForCausalLM, count_parameters
    from rmoe.training.build import model_config
    from rmoe.training.initial_scale import require_scale

    with torch.device("meta"):
        model = RMoEForCausalLM(model_config(config, vocab_size))
    if config.training.initial_logit_std is not None:
        require_scale(model, config.training.initial_logit_std)
    return count_parameters(model)["non_embedding"]


def _buildable(plan: Plan, vocab_size: int) -> tuple[Plan, list[str]]:
    """Build every model on no device, so that a router that cannot work here is found before the first step of any.

    Returns:
        The plan without those of `all` that cannot work, and why each is left out.

    Raises:
        RequestError: a router that was named cannot work.
    """
    notes = []
    for router in plan.routers:
        try:
            _count(plan.config_of(router, 0, {}), vocab_size)
        except RequestError as error:
            if router not in plan.optional:
                raise
            notes.append(f"{router} is left out: {error}")
            plan = replace(plan, routers=tuple(name for name in plan.routers if name != router))
    return plan, notes


def _matched(plan: Plan, vocab_size: int) -> tuple[Plan, list[str]]:
    """The plan with expert widths that give every router the baseline's parameters, and that said."""
    from rmoe.compare.match import ALIGNED, KNOB, TOLERANCE, matched_widths

    width = plan.config.model.moe_intermediate_size
    counts = {
        router: {
            w: _count(plan.config_of(router, 0, {}).with_setting(KNOB, w), vocab_size)
            for w in (width, width + 1)
        }
        for router in plan.routers
    }
    found = matched_widths(counts, plan.baseline, width)
    changes = {
        name: plan.changes.get(name, {}) | ({KNOB: m.value} if name in found and (m := found[name]) else {})
        for name in plan.routers
    }
    widths = ", ".join(f"{name} {m.value} ({m.error:+.2%})" for name, m in found.items())
    note = (
        f"Parameters are matched to {plan.baseline}'s within {TOLERANCE:.1%} by the experts' width "
        f"({plan.baseline} {width}): {widths}. Expert weights then start from other values; all else starts equal."
    )
    notes = [note]
    slow = [name for name, m in found.items() if not m.is_aligned]
    if slow:
        notes.append(
            f"{', '.join(slow)}: no multiple of {ALIGNED} columns matches, so the experts run in a plain loop; the "
            "time column is not comparable."
        )
    return replace(plan, changes={name: change for name, change in changes.items() if change}), notes


# --- phases --------------------------------------------------------------------------------------


def _train_until_decided(setting: _Setting, pool: Pool) -> _Setting:
    """Train what is missing; with looks, one pair more of every undecided router at each.

    Which router stops when follows from the rows alone, so an interrupted comparison comes to the same runs.

    Returns:
        The setting with the plan of what was trained.
    """
    looks = setting.plan.looks
    if looks is None:
        _train_missing(setting, pool)
        return setting
    for pairs in looks:
        setting = replace(setting, plan=replace(setting.plan, seeds=pairs))
        _train_missing(setting, pool)
        decided = _decided(setting, pairs)
        setting = replace(setting, plan=replace(setting.plan, decided=decided | setting.plan.decided))
        undecided = set(setting.plan.routers) - {setting.plan.baseline} - set(setting.plan.decided)
        if not undecided:
            break
        print(f"after {pairs} pairs not decided: {', '.join(sorted(undecided))}", file=sys.stderr, flush=True)
    return setting


def _decided(setting: _Setting, pairs: int) -> dict[str, int]:
    """Routers whose verdict stands after so many pairs."""
    rows = _planned_rows(setting)[0]
    if not any(row.status == "finished" for row in rows):
        return {}
    plan = setting.plan
    summary = summarise(rows, "", plan.baseline, margin=setting.options.margin, looks=plan.looks)
    verdicts = {r.router: r.difference.verdict for r in summary.routers if r.difference is not None}
    return {
        name: pairs
        for name, verdict in verdicts.items()
        if verdict not in ("not decided", "one seed: no verdict")
    }


def _planned_rows(setting: _Setting) -> tuple[list[ResultRow], list[str]]:
    """The rows that count: with looks those of the plan, else all there are."""
    rows, problems = read_rows(setting.results)
    if setting.plan.looks is not None:
        keys = {run.key for run in setting.plan.runs()}
        rows = [row for row in rows if row.key in keys]
    return rows, problems


def _train_missing(setting: _Setting, pool: Pool) -> None:
    """Train every run that has no finished row, several at once."""
    known = setting.rows()
    missing = [r for r in setting.plan.runs() if r.key not in known or known[r.key].status != "finished"]
    if not missing:
        return

    def note(run: Run, answer: Answer) -> None:
        if answer.stopped:
            raise RunError(f"{run.key}: {answer.error}", "every finished run", "run the same command again")
        append_row(setting.results, _row(setting, run, answer))
        progress.finished(run.key, answer.error)

    def job(run: Run) -> Train:
        return Train(config=run.config.to_dict(), folder=str(setting.folder(run)))

    steps, sharing = setting.plan.config.training.max_steps, setting.sharing
    print(
        f"training {counted([len(missing)], 'run')}, {sharing.jobs} at once with "
        f"{counted([sharing.threads], 'thread')} each; logs in {setting.out / 'logs'}",
        file=sys.stderr,
        flush=True,
    )
    with Progress({run.key: setting.folder(run) for run in missing}, steps) as progress:
        pool.map(missing, job, note)


def _train_branches(setting: _Setting, pool: Pool) -> None:
    """Train the baseline's shorter runs that are missing, each from its longer run's checkpoint."""
    path = setting.out / plans.BRANCHES
    known = {row.key for row in read_rows(path)[0] if row.status == "finished"} if path.exists() else set()
    rows = setting.rows()
    missing = [
        (branch, run)
        for branch, run in setting.plan.branches()
        if branch.key not in known and run.key in rows and rows[run.key].status == "finished"
    ]
    if not missing:
        return

    def note(pair: tuple[Run, Run], answer: Answer) -> None:
        if answer.stopped:
            raise RunError(
                f"{pair[0].key}: {answer.error}", "every finished run", "run the same command again"
            )
        append_row(path, _row(setting, pair[0], answer))
        state = f"failed: {answer.error}" if answer.error else "finished"
        print(f"{pair[0].key} {state}", file=sys.stderr, flush=True)

    def job(pair: tuple[Run, Run]) -> Train:
        branch, run = pair
        return Train(
            config=branch.config.to_dict(),
            folder=str(setting.out / "branches" / branch.key),
            branch_of=str(setting.folder(run)),
        )

    print(
        f"training {counted([len(missing)], 'branch')} of {setting.plan.baseline} ...",
        file=sys.stderr,
        flush=True,
    )
    pool.map(missing, job, note)


def _row(setting: _Setting, run: Run, answer: Answer) -> ResultRow:
    """The line of results.jsonl that an answer makes."""
    if answer.error is not None:
        return ResultRow(
            router=run.router,
            router_spec=ZOO[run.router].spec.to_dict(),
            seed=run.seed,
            sweep=run.sweep,
            config=run.config.to_dict(),
            versions=setting.versions,
            hardware=setting.hardware,
            corpus=setting.corpus,
            status="failed",
            error=answer.error,
        )
    result = msgspec.convert(answer.value, RunResult)
    return ResultRow(
        router=run.router,
        router_spec=result.router_spec,
        seed=run.seed,
        sweep=run.sweep,
        config=result.config,
        versions=result.versions,
        hardware=result.hardware,
        corpus=result.corpus,
        status="finished",
        steps=result.steps,
        tokens=result.tokens,
        val=result.val,
        test=result.test,
        parameters=result.parameters,
        curves=result.curves,
        routing=result.routing,
        initial_logits=result.initial_logits,
        layer_curves=result.layer_curves,
        test_losses=result.test_losses,
        averaged=result.averaged,
    )


def _judge_chosen(setting: _Setting, pool: Pool) -> None:
    """With a sweep: the test split, once, for the point each router does best at on validation."""
    rows = setting.rows()
    chosen = chosen_sweep(sweep_points(list(rows.values())))
    runs = [
        run
        for run in setting.plan.runs()
        if run.sweep == chosen.get(run.router)
        and (row := rows.get(run.key)) is not None
        and row.status == "finished"
        and row.test is None
    ]
    if not runs:
        return

    def note(run: Run, answer: Answer) -> None:
        if answer.error is not None:
            raise RunError(
                f"judging {run.key} on the test split failed: {answer.error}",
                "every run",
                "run the same command again",
            )
        append_row(setting.results, msgspec.structs.replace(rows[run.key], test=answer.value))

    pool.map(runs, lambda run: Judge(config=run.config.to_dict(), folder=str(setting.folder(run))), note)


def _first_runs(setting: _Setting) -> dict[str, Run]:
    """Router -> its first finished run at its chosen sweep point."""
    rows = setting.rows()
    chosen = chosen_sweep(sweep_points(list(rows.values())))
    found: dict[str, Run] = {}
    for run in setting.plan.runs():
        finished = run.key in rows and rows[run.key].status == "finished"
        if finished and run.sweep == chosen.get(run.router):
            found.setdefault(run.router, run)
    return found


def _time_alone(setting: _Setting) -> None:
    """Time and memory of every router, one at a time, in turns; kept with the router's first run.

    Routers that were timed in another session are timed again with the new ones: figures of one table come from
    one phase.
    """
    rows, runs = setting.rows(), _first_runs(setting)
    if not setting.options.timing_rounds or all(rows[run.key].timing for run in runs.values()):
        return
    print("timing each router alone ...", file=sys.stderr, flush=True)
    configs = {router: run.config for router, run in runs.items()}
    found = time_alone(configs, setting.sharing.threads, setting.options.timing_rounds, setting.out / "logs")
    for router, timing in found.items():
        append_row(setting.results, msgspec.structs.replace(rows[runs[router].key], timing=timing))


def _analyse(setting: _Setting, pool: Pool) -> Analysis | None:
    """Measure the routing of each router's first run; `analysis.json`."""
    if not setting.options.analysis_tokens:
        return None
    path = setting.out / plans.ANALYSIS
    rows, runs = setting.rows(), _first_runs(setting)
    ranked = sorted(runs, key=lambda name: (name != setting.plan.baseline, rows[runs[name].key].val))
    wanted = ranked[:ANALYSED_AT_MOST]
    if path.exists() and [m.name for m in read_analysis(path).models] == wanted:
        return read_analysis(path)
    print("measuring how each router routes ...", file=sys.stderr, flush=True)
    found: dict[str, ModelAnalysis] = {}
    notes = [f"Of each router, the run with seed {setting.plan.config.training.seed} is analysed."]
    if len(ranked) > len(wanted):
        notes.append(
            f"Analysed: {setting.plan.baseline} and the {len(wanted) - 1} routers with the lowest loss."
        )

    def note(name: str, answer: Answer) -> None:
        if answer.error is not None:
            notes.append(f"{name} could not be analysed: {answer.error}")
        else:
            found[name] = msgspec.convert(answer.value, ModelAnalysis)

    def job(name: str) -> Any:
        run = runs[name]
        return Measure(
            config=run.config.to_dict(),
            folder=str(setting.folder(run)),
            name=name,
            tokens=setting.options.analysis_tokens,
        )

    pool.map(wanted, job, note)
    if not found:
        return None
    analysis = Analysis(
        text=Text(
            name=f"{setting.corpus.name}, validation split",
            sha256=setting.corpus.sha256,
            tokens=max((m.entropy.n for m in found.values() if m.entropy), default=0),
        ),
        models=[found[name] for name in wanted if name in found],
        notes=notes,
    )
    write_analysis(path, analysis)
    return analysis
