"""`rmoe compare`: several routers on the same text, with paired seeds and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from rmoe.cli.arguments import names
from rmoe.compare.engines.config import EngineConfig
from rmoe.errors import RequestError, RunError
from rmoe.training.config import RunConfig


def run(
    *,
    routers: str,
    out: Path,
    seeds: int = 3,
    baseline: str | None = None,
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    match_params: bool = False,
    match_logits: float | None = None,
    until_decided: bool = False,
    max_seeds: int | None = None,
    lengths: tuple[int, ...] = (),
    gate: Path | None = None,
    jobs: int | None = None,
    margin: float = 0.01,
    timing_rounds: int = 3,
    analysis_tokens: int = 65_536,
    single_file: bool = False,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
    config: Annotated[RunConfig, tyro.conf.arg(name="")],
) -> None:
    """Train several routers with paired seeds and compare them; resumes what is missing.

    Writes results.jsonl, summary.json, summary.md, analysis.json and report/index.html into --out.

    Args:
        routers: names from `rmoe zoo`, separated by commas, or `all`.
        out: a new folder, or that of the same comparison: what is missing of it is trained.
        seeds: runs per router. One seed gives no verdict.
        baseline: the router the others are compared with; `smoe` where it is compared, else the first.
        sweep: SETTING=VALUE,VALUE,...: each router gets its own value, chosen on validation with equal budgets; the
            test split is then evaluated once. May be given several times.
        match_params: give every router the baseline's number of parameters, by the width of its experts.
        match_logits: start every router at this standard deviation of its raw logits, 1.0 for one: how sharp a gate
            starts can matter more than the router. The same as --training.initial-logit-std.
        until_decided: add pairs, from --seeds to --max-seeds, until every verdict stands. Verdicts keep their level
            over all looks; a decided router gets no more runs.
        max_seeds: of --until-decided.
        lengths: two shorter lengths of the baseline, branched from its runs (--training.schedule wsd): gives bits at
            equal seconds and an effective speed-up beside bits at equal steps.
        gate: folder of a finished comparison at another size: a router is better when it is better at both, else it is
            not better.
        jobs: runs at once on this machine. Results do not depend on it; the default fills the cores, one thread a run,
            at small sizes, and runs one on each GPU.
        margin: differences smaller than this, in bits, count as none.
        timing_rounds: turns each router gets in the phase that times it alone; 0 leaves time and memory blank.
        analysis_tokens: tokens of the validation split whose routing is measured; 0 leaves that out.
        single_file: put the plotting library into the report's page, so that it can be sent alone.
        engine: where the runs are carried out: `--engine ray`. See the table below and docs/scale.md.
        config: see the tables below; `--router` and `--training.seed` (the first seed) aside, for every run.
    """
    from rmoe.compare.compare import Options, compare
    from rmoe.report.table import terminal

    if until_decided != (max_seeds is not None):
        allowed = "a number, with --until-decided" if until_decided else "left out without --until-decided"
        raise RequestError("--max-seeds", max_seeds, allowed)
    summary = compare(
        config,
        names(routers),
        seeds,
        out,
        baseline=baseline,
        sweep=sweep,
        match_params=match_params,
        match_logits=match_logits,
        max_seeds=max_seeds,
        lengths=lengths,
        gate=gate,
        options=Options(
            jobs=jobs,
            margin=margin,
            timing_rounds=timing_rounds,
            analysis_tokens=analysis_tokens,
            single_file=single_file,
            engine=engine,
        ),
    )
    print(terminal(summary))
    print()
    print(summary.verdict)
    for note in summary.notes:
        print(f"note: {note}")
    print(f"report: {(out / 'report' / 'index.html').resolve()}")
    failed = sum(router.failed for router in summary.routers) + summary.failed_branches
    if failed:
        raise RunError(f"runs that failed: {failed}", "every other run", "the same command trains them again")
