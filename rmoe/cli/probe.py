"""`rmoe probe`: what routers can do, on tasks with a known optimum."""

from __future__ import annotations

import math
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rmoe.cli.arguments import names
from rmoe.compare.engines.config import EngineConfig
from rmoe.errors import RequestError, RunError, one_line
from rmoe.places import require_writable
from rmoe.validation import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rmoe.probes.runner import ProbeUnit
    from rmoe.results.probes import Knobs, ProbeRow


def run(
    *,
    routers: str,
    probes: str = "all",
    seeds: int = 8,
    out: Path | None = None,
    baseline: str | None = None,
    margin: float = 0.02,
    knob: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    router_option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    plugin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    jobs: int | None = None,
    single_file: bool = False,
    engine: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Train routers on tasks built so that routing is everything, and compare them with the optimum; resumes.

    Regret is 0 at the optimum and 1 for a router that knows nothing. Prints a table; with --out it writes
    results.jsonl, summary.json, summary.md and report/index.html.

    Args:
        routers: names from `rmoe zoo`, separated by commas; `paper` for the rows of the paper's tables; `all`.
        probes: names separated by commas (lookup, carry, integrate, overwrite, compose, zipf, late, decoy), or all.
        seeds: paired seeds per router and probe. One seed gives no verdict.
        out: a new folder, or that of the same probes: what is missing of them is trained.
        baseline: the router the others are compared with; `smoe` where it is there, else the first.
        margin: differences of regret smaller than this count as none.
        knob: NAME=VALUE, how hard the probes are and how long routers learn: noise, layers, experts, top_k, width,
            steps, tokens, learning_rate, balance. May be given several times.
        sweep: KNOB=VALUE,VALUE,...: runs every value and draws regret over them.
        router_option: changes to every router, `stage.option=value`: `gate.order=topk_softmax`.
        plugin: a module or .py file that registers routers. May be given several times.
        jobs: processes at once; the default fills the cores. Results do not depend on it.
        single_file: put the plotting library into the report's page, so that it can be sent alone.
        engine: where they are carried out: `--engine ray`. See the table below and docs/scale.md.
    """
    from rmoe.compare.engines.devices import cores
    from rmoe.compare.probes import summarise
    from rmoe.plugins import load_plugins
    from rmoe.probes import runner
    from rmoe.probes.stack import fitted
    from rmoe.records import write_record
    from rmoe.report.probes import table
    from rmoe.report.probes.page import write_page
    from rmoe.results.probes import knobs_with
    from rmoe.routing.spec import with_options
    from rmoe.routing.zoo import find, select

    engine.require_jobs(jobs)
    # Probes are too small for a GPU.
    require(not engine.gpus, "--engine.gpus", engine.gpus, "unset: probes run on cores")
    require(
        engine.runs_per_gpu == 1, "--engine.runs-per-gpu", engine.runs_per_gpu, "unset: probes run on cores"
    )
    require(0 <= margin < math.inf, "--margin", margin, "0 or more, and finite")
    require(out is not None or not single_file, "--single-file", True, "unset without --out")
    # Slurm's jobs stay when this process ends, and need a folder that does.
    require(out is not None or engine.kind != "slurm", "--out", out, "a folder with --engine slurm")
    if out is not None:
        require_writable(out)
        _require_own(out)
    load_plugins(plugin)
    chosen = select(names(routers))
    if baseline is not None and baseline not in chosen:
        raise RequestError("--baseline", baseline, f"one of --routers: {', '.join(chosen)}")
    base = knobs_with(dict(_pair("--knob", one) for one in knob))
    settings, swept = _swept(base, sweep)
    if router_option and any(k.width != base.width for k in settings):
        raise RequestError("--sweep", "width", "another knob, or no --router-option")
    asked = {
        name: replace(find(name), spec=with_options(fitted(find(name).spec, base.width), router_option))
        for name in chosen
    }
    with ExitStack() as folder:  # let go of once all is written
        rows = runner.run(
            asked if router_option else chosen,
            names(probes),
            seeds,
            out,
            knobs=settings,
            plugins=plugin,
            carried_out=lambda units: _on_engine(engine, units, out, jobs or cores(), folder),
            progress=lambda line: print(one_line(line), file=sys.stderr, flush=True),
        )
        found = summarise(rows, baseline, margin, swept)
        print(table.terminal(found))
        if out is not None:
            write_record(out / "summary.json", found)
            (out / "summary.md").write_text(table.markdown(found), encoding="utf-8")
            page = write_page(out / "report", found, single_file)
            print(f"report: {page.resolve()}")


def _require_own(out: Path) -> None:
    """Refuse a folder of something else: its summary and its report would be replaced."""
    from rmoe.compare.plan import COMPARISON
    from rmoe.probes.runner import RESULTS
    from rmoe.training.run_folder import LOCK, refuse_other

    allowed = "a new or empty folder, or one of earlier probes"
    require(not (out / COMPARISON).exists(), "--out", str(out), allowed)  # which has results of that name too
    refuse_other(out, RESULTS, {LOCK, "logs", "engine"}, allowed)


def _on_engine(
    config: EngineConfig, units: Sequence[ProbeUnit], out: Path | None, jobs: int, folder: ExitStack
) -> Iterator[list[ProbeRow]]:
    """Every unit's rows, as they come; few units need no processes of their own. Gives `folder` the lock of `out`."""
    from rmoe.compare.engines import Wants, engine_of
    from rmoe.compare.engines.engine import named
    from rmoe.probes.runner import one_by_one
    from rmoe.training.run_folder import locked

    wants = Wants(cpus=config.cpus or 1, memory_gib=config.memory_gib)
    jobs = max(1, min(jobs, len(units)))
    with (
        tempfile.TemporaryDirectory() as scratch,
        engine_of(config, out or Path(scratch), wants, jobs, threads=1) as engine,
    ):
        if out is not None:
            folder.enter_context(locked(out))
        if config.kind == "local" and jobs < 2:
            yield from one_by_one(units)
            return
        for _, answer in engine.answers({named("unit", unit): unit for unit in units}, wants):
            if answer.error is not None:
                saved = "nothing, without --out" if out is None else f"what finished before, in {out}"
                raise RunError(answer.error, saved, "run the same command again")
            yield answer.value


def _pair(option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not value:
        raise RequestError(option, text, "NAME=VALUE")
    return name, value


def _swept(base: Knobs, asked: tuple[str, ...]) -> tuple[list[Knobs], str | None]:
    """The settings of a sweep, and the knob that is swept; the base alone without one."""
    from rmoe.results.probes import knobs_with

    if not asked:
        return [base], None
    if len(asked) > 1:
        raise RequestError("--sweep", ", ".join(asked), "one knob")
    name, values = _pair("--sweep", asked[0])
    settings = [knobs_with({name: value}, base) for value in dict.fromkeys(values.split(","))]
    require(
        all(getattr(k, name) is not None for k in settings), "--sweep", asked[0], "numbers: points on an axis"
    )
    return settings, name
