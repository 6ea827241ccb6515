"""How far a run is: a bar on a terminal, plain lines in a log. On stderr; stdout is for results."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rmoe.results.run import Unit
from rmoe.training.hooks import Hook
from rmoe.training.metrics import Row

if TYPE_CHECKING:
    from rmoe.training.loop import Loop

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport(Hook):
    """Shows steps, loss in the corpus's unit, rate and time left.

    Args:
        unit: the corpus's; the rows have a field of this name.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: Any = None
        self.rate = 0.0
        self.said = ""
        self.begun, self.first_step, self.last_line = 0.0, 0, 0.0

    def begin(self, loop: Loop) -> None:
        if not loop.is_main:
            return
        self.begun, self.first_step = time.monotonic(), loop.step
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=loop.plan.max_steps, completed=loop.step, said="")
            self.bar.start()

    def step_end(self, loop: Loop) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=loop.step)

    def log(self, loop: Loop, row: Row) -> None:
        if not loop.is_main or self.unit not in row:
            return
        unit = self.unit.replace("_", " ")
        if row["kind"] == "eval":
            self._line(loop, f"validation {row[self.unit]:.4f} {unit}")
            return
        self.said = f"{row[self.unit]:.4f} {unit}  {row.get('tokens_per_s') or 0:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, said=self.said)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._line(loop, f"{self.said}  {self._left(loop)} left")

    def end(self) -> None:
        """Give the terminal back; harmless twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, loop: Loop, text: str) -> None:
        self.last_line = time.monotonic()
        line = f"step {loop.step}/{loop.plan.max_steps}  {text}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _left(self, loop: Loop) -> str:
        done = loop.step - self.first_step
        if not done:
            return "?"
        seconds = round((time.monotonic() - self.begun) / done * (loop.plan.max_steps - loop.step))
        hours, rest = divmod(seconds, 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
