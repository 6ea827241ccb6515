"""What may watch a training loop: progress, the profiler, trackers. A hook changes nothing that is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from rmoe.training.metrics import Row
from rmoe.training.plan import StepPlan


class Running(Protocol):
    """What a hook may read of the loop.

    Attributes:
        plan: what happens at which step.
        step: optimizer steps done, skipped ones included.
        is_main: whether this is the process that reports.
        device: of this process.
        bf16: whether the model runs under bfloat16 autocast.
    """

    plan: StepPlan
    step: int

    @property
    def is_main(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def bf16(self) -> bool: ...

    @property
    def ended(self) -> bool:
        """Whether there is no step after this one."""
        ...


class Hook:
    """Every method does nothing unless overridden."""

    def begin(self, loop: Running) -> None:
        """Before the first step of this process; a resumed run is at its step already."""

    def step_begin(self, loop: Running) -> None:
        """Before the batches of a step are computed; `loop.step` does not count it yet."""

    def step_end(self, loop: Running) -> None:
        """After a step, skipped or not; `loop.step` counts it."""

    def log(self, loop: Running, row: Row) -> None:
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

    def begin(self, loop: Running) -> None:
        self.accelerator.init_trackers("rmoe", self.settings)

    def log(self, loop: Running, row: Row) -> None:
        numbers = {name: value for name, value in scalars(row).items() if name != "step"}
        self.accelerator.log({f"{row['kind']}/{name}": value for name, value in numbers.items()}, row["step"])

    def end(self) -> None:
        # Not `accelerator.end_training()`: it would also end the process group.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def scalars(row: Row) -> dict[str, float]:
    """A row's numbers, lists as `name/0`, `name/1`, ...: what TensorBoard and its like take."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float):
            flat[name] = value
        elif isinstance(value, list):
            flat |= {f"{name}/{index}": item for index, item in enumerate(value)}
    return flat
