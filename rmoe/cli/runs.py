"""`rmoe runs`: what runs there are, and how they fare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from rmoe.errors import RequestError, one_line

if TYPE_CHECKING:
    from rmoe.training.listing import RunStatus


SECONDS_BETWEEN = 2.0


def run(root: tyro.conf.Positional[Path] = Path("."), *, json: bool = False, watch: bool = False) -> None:
    """List the runs below a folder: state, step, last loss, rate, time left; those of a grid on any engine, too.

    A run that died (its process is gone and its last steps were not saved) goes on with `rmoe train --resume`; one
    of a grid that is lost (nothing carries it out any more) when its `rmoe compare` is called again.

    Args:
        root: where to look, four levels deep, through links too.
        json: one JSON list on stdout instead of a table.
        watch: refresh the table until nothing runs or waits, or Ctrl-C.
    """
    import sys

    from rmoe.compare.engines.listing import grid_runs
    from rmoe.records import indented

    if json and watch:
        raise RequestError("--watch", True, "left out with --json")
    if watch:
        _watch(root)
        return
    runs = grid_runs(root)
    if json:
        sys.stdout.buffer.write(indented(runs))
        return
    print(_table(runs) if runs else f"no runs in {root}")


def _watch(root: Path) -> None:
    import time

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from rmoe.compare.engines.listing import grid_runs

    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            runs = grid_runs(root)
            live.update(
                Text(
                    _table([_below(root, run) for run in runs]) if runs else f"no runs in {root}",
                    no_wrap=True,
                ),
                refresh=True,
            )
            if not any(run.state in ("running", "queued") for run in runs):
                return
            time.sleep(SECONDS_BETWEEN)


def _below(root: Path, run: RunStatus) -> RunStatus:
    """Named from the root on: a terminal is narrow."""
    import msgspec

    return msgspec.structs.replace(run, folder=str(Path(run.folder).relative_to(root)))


def _table(runs: list[RunStatus]) -> str:
    from rmoe.report.table import aligned

    def line(item: RunStatus) -> list[str]:
        return [
            one_line(item.folder),
            one_line(item.router),
            str(item.seed),
            item.state,
            f"{item.step}/{item.steps}",
            _number(item.loss, ".4f"),
            _number(item.validation, ".4f"),
            _number(item.tokens_per_s, ",.0f"),
            _duration(item.seconds_left),
            _duration(item.quiet_s),
            "-" if item.checkpoint is None else str(item.checkpoint),
        ]

    heads = ["run", "router", "seed", "state", "step", "loss", "valid", "tokens/s"]
    heads += ["left", "quiet", "checkpoint"]
    return aligned([heads, *map(line, runs)])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f}h" if hours >= 1 else f"{minutes:.0f}m" if minutes >= 1 else f"{seconds:.0f}s"
