"""How far a run is: a bar on a terminal, plain lines in a log. On stderr; stdout is for results."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from rmoe.training.result import Unit

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport(TrainerCallback):
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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.begun, self.first_step = time.monotonic(), state.global_step
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
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, said="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        unit = self.unit.replace("_", " ")
        if f"eval_{self.unit}" in logs:
            self._line(state, f"validation {logs[f'eval_{self.unit}']:.4f} {unit}")
        elif self.unit in logs:
            self.said = f"{logs[self.unit]:.4f} {unit}  {logs.get('tokens_per_s') or 0:,.0f} tokens/s"
            if self.bar is not None:
                self.bar.update(self.task, said=self.said)
            elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
                self._line(state, f"{self.said}  {self._left(state)} left")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; harmless twice."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, state: TrainerState, text: str) -> None:
        self.last_line = time.monotonic()
        line = f"step {state.global_step}/{state.max_steps}  {text}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return "?"
        seconds = round((time.monotonic() - self.begun) / done * (state.max_steps - state.global_step))
        hours, rest = divmod(seconds, 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
