"""How a run ends before its last step: asked to by a signal, or because its loss is no number any more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rmoe.errors import RunError, Stopped
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.loop import Loop
from rmoe.training.place import say


@contextmanager
def signals(loop: Loop) -> Iterator[None]:
    """SIGTERM and SIGINT save and stop after the current step; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def handle(number: int, _frame: Any) -> None:
        loop.stop_requested = True
        signal.signal(number, before[number])
        say(f"{signal.Signals(number).name}: saving and stopping after this step")

    before: dict[int, Any] = {}
    for wanted in (signal.SIGTERM, signal.SIGINT):
        before[wanted] = signal.signal(wanted, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_unless_finished(loop: Loop, store: CheckpointStore) -> None:
    step = loop.step
    if loop.diverged:
        raise RunError(
            f"the loss or its gradient was not finite in {loop.skipped_batches} batches, the last at step {step}",
            store.saved(),
            "lower the learning rate in a new run; or --resume after this batch, with more "
            "--training.max-skipped-batches",
        )
    if loop.stopped and step < loop.plan.max_steps:
        raise Stopped(
            f"stopped at step {step} of {loop.plan.max_steps}; saved: {store.saved()}; --resume goes on"
        )
