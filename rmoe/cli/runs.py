"""`rmoe runs`: what runs there are, and how they fare."""

from __future__ import annotations

from pathlib import Path

import tyro

from rmoe.errors import one_line


def run(root: tyro.conf.Positional[Path] = Path("."), *, json: bool = False) -> None:
    """List the runs below a folder: state, step, last loss, rate, time left, and which died.

    A run that died (its process is gone and its last steps were not saved) goes on with `rmoe train --resume`.

    Args:
        root: where to look, four levels deep.
        json: one JSON list on stdout instead of a table.
    """
    import sys

    import msgspec

    from rmoe.training.listing import RunStatus, find_runs

    runs = find_runs(root)
    if json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(runs), indent=1) + b"\n")
        return
    if not runs:
        print(f"no runs in {root}")
        return

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

    heads = [
        "run",
        "router",
        "seed",
        "state",
        "step",
        "loss",
        "valid",
        "tokens/s",
        "left",
        "quiet",
        "checkpoint",
    ]
    rows = [heads, *map(line, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f}h" if hours >= 1 else f"{minutes:.0f}m" if minutes >= 1 else f"{seconds:.0f}s"
