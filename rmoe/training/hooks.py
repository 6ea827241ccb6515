"""What may watch a training loop: progress, the profiler, trackers. A hook changes nothing that is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from rmoe.training.metrics import Row

if TYPE_CHECKING:
    from rmoe.training.loop import Loop


class Hook:
    """Every method does nothing unless overridden."""

    def begin(self, loop: Loop) -> None:
        """Before the first step of this process; a resumed run is at its step already."""

    def step_begin(self, loop: Loop) -> None:
        """Before the batches of a step are computed; `loop.step` does not count it yet."""

    def step_end(self, loop: Loop) -> None:
        """After a step, skipped or not; `loop.step` counts it."""

    def log(self, loop: Loop, row: Row) -> None:
        """A `train` or `eval` row of metrics.jsonl."""

    def end(self) -> None:
        """After the last step, or when an error ends the run; also if `begin` was never called."""


class Trackers(Hook):
    """Logs every row's numbers through accelerate's trackers: lists as `train/name/0`, `train/name/1`, ...

    Args:
        accelerator: made with `log_with`.
        settings: of the run, dotted names.
    """

    def __init__(self, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        self.settings = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in settings.items()
        }

    def begin(self, loop: Loop) -> None:
        self.accelerator.init_trackers("rmoe", self.settings)

    def log(self, loop: Loop, row: Row) -> None:
        numbers: dict[str, float] = {}
        for name, value in row.items():
            if isinstance(value, list):
                numbers |= {f"{row['kind']}/{name}/{index}": item for index, item in enumerate(value)}
            elif isinstance(value, int | float) and name != "step":
                numbers[f"{row['kind']}/{name}"] = value
        self.accelerator.log(numbers, row["step"])

    def end(self) -> None:
        # Not `accelerator.end_training()`: it would also end the process group.
        for tracker in self.accelerator.trackers:
            tracker.finish()
