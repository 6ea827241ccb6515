"""`compare`: trains what is missing of a grid, compares, and writes table and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from rmoe.compare import plan as plans
from rmoe.compare.engines import Engine, engine_of
from rmoe.compare.engines.devices import devices
from rmoe.compare.engines.local import LocalEngine
from rmoe.compare.equal_time import with_branch_points
from rmoe.compare.gate import gated, read_other
from rmoe.compare.phases import Options as Options
from rmoe.compare.phases import (
    Setting,
    analyse,
    evaluate_chosen,
    planned_rows,
    time_each_alone,
    train_branches,
    train_until_decided,
)
from rmoe.compare.plan import ComparisonPlan
from rmoe.compare.sharing import place
from rmoe.compare.summary import summarise
from rmoe.errors import RequestError, RunError
from rmoe.places import require_writable
from rmoe.records import read_record, write_record
from rmoe.report import table
from rmoe.report.page import write_report
from rmoe.results.analysis import Analysis
from rmoe.results.comparison import Summary
from rmoe.results.rows import SweepValue, finished, read_rows
from rmoe.results.run import CorpusInfo
from rmoe.routing.zoo import ZOO, select
from rmoe.training.config import RunConfig
from rmoe.validation import require


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
    """Train every router with every seed, resume what is missing, and compare.

    Args:
        config: of every run, but for the router; its seed is the first of `seeds`.
        routers: names of the zoo or of plugins; `all` is the whole zoo.
        seeds: runs per router (and sweep point), paired: run s of every router has the same seed.
        out: a new folder, or that of the same comparison.
        baseline: what the others are compared with; `smoe` where it is compared, else the first router.
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
    said = " ".join(map(str, lengths))
    allowed = "left out with --sweep: first choose, then compare at what was chosen"
    require(not (lengths and sweep), "--lengths", said, allowed)
    if lengths:
        config = with_branch_points(config, lengths)
    if match_logits is not None:
        config = config.with_setting("training.initial_logit_std", match_logits)
    plan = replace(
        _plan(config, routers, seeds, baseline, sweep, max_seeds), lengths=tuple(sorted(set(lengths)))
    )
    other = None if gate is None else read_other(gate, plan)
    setting, engine, notes = _set_up(plan, out, match_params, options)
    with ExitStack() as folder:  # let go of once the engine has ended what runs, and all is written
        try:
            with engine:
                folder.enter_context(plans.held(out))
                notes += _enter(setting)
                setting = train_until_decided(setting, engine)
                here = _here(setting)
                with _near(here, engine) as near:
                    evaluate_chosen(here, near)
                    train_branches(setting, engine)
                    time_each_alone(setting, engine)
                    analysis = analyse(here, near)
        except KeyboardInterrupt:
            runs = f"{len(setting.rows())} of {len(setting.plan.runs())} runs"
            saved = f"{runs}, and checkpoints of those under way, in {out}"
            raise RunError("interrupted", saved, "run the same command again") from None
        return _written(setting, notes, other, analysis)


def _written(setting: Setting, notes: list[str], other: Summary | None, analysis: Analysis | None) -> Summary:
    """What a comparison has found, and the files that say it."""
    out, options = setting.out, setting.options
    rows, problems = planned_rows(setting)
    branches = {branch.key for branch, _ in setting.plan.branches()}
    if not finished(rows):
        error = rows[0].failure.error if rows[0].failure else None
        raise RunError(f"every run failed, {rows[0].key} with: {error}", "no model", f"see {out / 'logs'}")
    summary = summarise(
        rows,
        preset=setting.plan.config.preset,
        baseline=setting.plan.baseline,
        descriptions={name: row.summary for name, row in ZOO.items()},
        notes=[*notes, *_of_earlier_calls(setting, {row.router: None for row in rows}), *problems],
        margin=options.margin,
        looks=setting.plan.looks,
        branches=[row for row in read_rows(out / plans.BRANCHES)[0] if row.key in branches],
        planned=len(setting.plan.routers) - 1,
    )
    if other is not None:
        summary = gated(summary, other)
    write_record(out / plans.SUMMARY, summary)
    (out / "summary.md").write_text(table.markdown(summary), encoding="utf-8")
    write_report(out / "report", summary, analysis, single_file=options.single_file)
    return summary


def _of_earlier_calls(setting: Setting, routers: Iterable[str]) -> list[str]:
    """What a router of the table that this call did not ask for has that the others have not, or lacks."""
    from rmoe.compare.match import KNOB

    plan, notes = setting.plan, []
    changes = read_record(
        setting.out / plans.COMPARISON, plans.ComparisonRecord, plans.COMPARISON_VERSION
    ).changes
    matched = any(KNOB in own for own in plan.changes.values())
    for router in routers:
        own = changes.get(router, {})
        if router in plan.routers or not (own or matched):
            continue
        said = ", ".join(f"{name} {value}" for name, value in own.items()) or "no matched parameters"
        notes.append(f"{router}, of an earlier call, has {said}: it is no like-for-like comparison.")
    return notes


def _near(setting: Setting, engine: Engine) -> AbstractContextManager[Engine]:
    """Where finished models are: with the engine, or, once fetched, on this machine."""
    if setting.options.engine.fetch == "no":
        return nullcontext(engine)  # its own `with` ends it
    return LocalEngine([devices()[: setting.wants.gpus]], setting.sharing.threads, setting.out / "logs")


def _here(setting: Setting) -> Setting:
    """The setting for what finished models are evaluated with: once fetched, the GPUs that this machine has."""
    if setting.options.engine.fetch == "no":
        return setting
    return replace(setting, wants=replace(setting.wants, gpus=min(setting.one.gpus, len(devices()))))


# --- before anything is trained ------------------------------------------------------------------


def _plan(
    config: RunConfig,
    routers: Sequence[str],
    seeds: int,
    baseline: str | None,
    sweep: Sequence[str],
    max_seeds: int | None,
) -> ComparisonPlan:
    require(seeds >= 1, "--seeds", seeds, "1 or more")
    if max_seeds is not None:
        require(seeds >= 2, "--seeds", seeds, "2 or more with --until-decided: one pair has no spread")
        require(max_seeds >= seeds, "--max-seeds", max_seeds, f"--seeds ({seeds}) or more")
        allowed = "left out with --sweep: the choice would change as pairs come"
        require(not sweep, "--until-decided", True, allowed)
    alone = config.router == RunConfig.router
    require(alone, "--router", config.router, "left alone: --routers says what is compared")
    from rmoe.training.build import load_plugins

    load_plugins(config.plugin)
    names = select(routers)
    baseline = baseline or ("smoe" if "smoe" in names else names[0])
    compared = f"one of the routers compared: {', '.join(names)}"
    require(baseline in names, "--baseline", baseline, compared)
    return ComparisonPlan(
        config=config.with_setting("router", baseline),
        routers=names,
        seeds=seeds,
        baseline=baseline,
        sweep=plans.parse_sweep(config, sweep),
        changes=plans.only_k(names, config),
        optional=frozenset(names) - {*routers, baseline},
        looks=None if max_seeds is None else tuple(range(seeds, max_seeds + 1)),
    )


def _set_up(
    plan: ComparisonPlan, out: Path, match_params: bool, options: Options
) -> tuple[Setting, Engine, list[str]]:
    """Prepare the text once for all workers, and refuse what cannot work."""
    import torch

    from rmoe.data import prepare
    from rmoe.training.environment import hardware, versions

    training = plan.config.training
    on_gpu = torch.cuda.is_available() and training.device != "cpu"
    jobs, fetch = options.jobs, options.engine.fetch
    options.engine.require_jobs(jobs)
    lengths = " ".join(map(str, plan.lengths))
    allowed = "given with a shared folder, not engine.fetch"
    require(fetch == "no" or not lengths, "--lengths", lengths, allowed)
    allowed = "model with --sweep: the chosen models are evaluated here"
    require(fetch != "result" or not plan.sweep, "engine.fetch", fetch, allowed)
    allowed = "auto with engine.fetch model: finished models are evaluated on this machine, which has no GPU"
    here = fetch != "model" or training.device != "cuda" or torch.cuda.is_available()
    require(here, "training.device", training.device, allowed)
    wants, sharing = place(plan.config, options.engine, jobs, on_gpu)
    plan = replace(plan, config=plan.config.with_setting("training.threads", sharing.threads))
    prepared = prepare(plan.config.data, training.sequence_length)
    for split in ("train", "valid", "test"):
        known = split in prepared.manifest.splits
        require(known, "data.split", plan.config.data.split, f"a rule that gives a {split} split")
    corpus = CorpusInfo(name=prepared.manifest.source.name, sha256=prepared.manifest.key, unit=prepared.unit)
    notes = [
        f"{name} runs with {change['model.num_experts_per_tok']} expert(s) per token, the only number it is "
        "defined for: it is no like-for-like comparison."
        for name, change in plan.changes.items()
    ]
    if fetch != "no":
        notes.append(
            "Runs travelled without a shared folder: one whose machine died began anew, and no checkpoints are here."
        )
    plan, said = _buildable(plan, prepared.vocab_size)
    notes += said
    if match_params:
        plan, said = _matched(plan, prepared.vocab_size)
        notes += said
    if plan.config.preset == "quick":
        notes.append(
            "At the size of the quick preset no router is expected to win; the paper's small model saw none."
        )
    machine = hardware(sharing.threads, training.device)
    # Absolute: jobs may run where another folder is the current one.
    setting = Setting(plan, out.absolute(), sharing, options, corpus, versions(), machine, wants)
    return setting, engine_of(options.engine, out, wants, sharing.jobs, sharing.threads), notes


def _enter(setting: Setting) -> list[str]:
    """Take the folder, which this process holds."""
    from rmoe.training.build import load_plugins

    plan, kind = setting.plan, setting.options.engine.kind
    notes = plans.enter(setting.out, plan, setting.corpus.sha256, load_plugins(plan.config.plugin), kind)
    setting.rows()  # a results.jsonl of another version is refused before anything is trained
    return notes


def _count(config: RunConfig, vocab_size: int) -> int:
    """Non-embedding parameters of a configuration, without allocating them.

    Raises:
        RequestError: the router cannot work in this model, or in its layout.
    """
    import torch

    from rmoe.model import RMoEForCausalLM, count_parameters
    from rmoe.parallel.fit import require_fit
    from rmoe.training.build import model_config, require_router_parameters
    from rmoe.training.initial_scale import require_scale

    architecture = model_config(config, vocab_size)
    require_fit(architecture, config.parallel)
    with torch.device("meta"):
        model = RMoEForCausalLM(architecture)
    if config.training.initial_logit_std is not None:
        require_scale(model, config.training.initial_logit_std)
    require_router_parameters(model, config.training.router_learning_rate)
    return count_parameters(model)["non_embedding"]


def _buildable(plan: ComparisonPlan, vocab_size: int) -> tuple[ComparisonPlan, list[str]]:
    """Build every model on no device, so that a router that cannot work here is found before the first step of any.

    At every point of a sweep.

    Returns:
        The plan without those of `all` that cannot work, and why each is left out.

    Raises:
        RequestError: a router that was named cannot work.
    """
    notes = []
    for router in plan.routers:
        try:
            for point in plan.points():
                _require_free(router, point)
                _count(plan.config_of(router, 0, point), vocab_size)
        except RequestError as error:
            if router not in plan.optional:
                raise
            notes.append(f"{router} is left out: {error}")
            plan = replace(plan, routers=tuple(name for name in plan.routers if name != router))
    return plan, notes


def _require_free(router: str, point: Mapping[str, SweepValue]) -> None:
    """Refuse a sweep of the number of experts of a router that is defined for one only."""
    only = ZOO[router].top_k
    for name in point:
        if only is not None and name.rpartition(".")[2] == "num_experts_per_tok":
            raise RequestError("--sweep", name, f"another setting with {router}, whose only k is {only}")


def _matched(plan: ComparisonPlan, vocab_size: int) -> tuple[ComparisonPlan, list[str]]:
    """The plan with expert widths that give every router the baseline's parameters, and that said."""
    from rmoe.compare.match import ALIGNED, KNOB, TOLERANCE, matched_width

    width = plan.config.model.moe_intermediate_size
    counts = {
        router: {
            w: _count(plan.config_of(router, 0, {}).with_setting(KNOB, w), vocab_size)
            for w in (width, width + 1)
        }
        for router in plan.routers
    }
    target = counts[plan.baseline][width]
    found = {name: matched_width(width, own, target) for name, own in counts.items() if name != plan.baseline}
    changes = plan.changes | {
        name: plan.changes.get(name, {}) | {KNOB: value} for name, (value, _) in found.items()
    }
    widths = ", ".join(f"{name} {value} ({error:+.2%})" for name, (value, error) in found.items())
    note = (
        f"Parameters are matched to {plan.baseline}'s within {TOLERANCE:.1%} by the experts' width "
        f"({plan.baseline} {width}): {widths}. Expert weights then start from other values; all else starts equal."
    )
    notes = [note]
    slow = [name for name, (value, _) in found.items() if value % ALIGNED]
    if slow:
        notes.append(
            f"{', '.join(slow)}: no multiple of {ALIGNED} columns matches, so the experts run in a plain loop; the "
            "time column is not comparable."
        )
    plan = replace(plan, changes=changes)
    _require_matched(plan, vocab_size)
    return plan, notes


def _require_matched(plan: ComparisonPlan, vocab_size: int) -> None:
    """Refuse a sweep that gives a router another number of parameters at one of its points."""
    for router in plan.routers:
        matched = plan.config_of(router, 0, {})
        for point in plan.points():
            config = plan.config_of(router, 0, point)
            if config.model != matched.model and _count(config, vocab_size) != _count(matched, vocab_size):
                raise RequestError(
                    "--match-params",
                    True,
                    f"left out with a sweep that changes the number of parameters ({', '.join(plan.sweep)})",
                )
