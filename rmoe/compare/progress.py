"""How far a grid is: one bar over all steps of all runs, read from their metrics files. Imports no torch."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class _Line(msgspec.Struct):
    step: int


class Progress:
    """A bar on a terminal; elsewhere one line per finished run.

    Args:
        runs: run -> its folder and its steps.
    """

    def __init__(self, runs: dict[str, tuple[Path, int]]) -> None:
        self.runs = runs
        self._done: set[str] = set()
        self._over = threading.Event()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        total = sum(steps for _, steps in runs.values())
        self._task = self._bar.add_task(f"{len(runs)} runs", total=total)
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._bar.start()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watcher.join()
        self._bar.stop()

    def finished(self, run: str, error: str | None) -> None:
        """A run has ended."""
        self._done.add(run)
        state = f"failed: {error}" if error else "finished"
        print(f"{run} {state} ({len(self._done)} of {len(self.runs)})", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            reached = sum(
                steps if run in self._done else last_step(folder / "metrics.jsonl")
                for run, (folder, steps) in self.runs.items()
            )
            self._bar.update(
                self._task, completed=reached, description=f"{len(self._done)} of {len(self.runs)} runs"
            )


def last_step(metrics: Path) -> int:
    """The step of the last whole line of a metrics file; 0 without one. Reads the file's end only."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 16_384))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return msgspec.json.decode(line, type=_Line).step
        except msgspec.DecodeError:
            continue
    return 0
