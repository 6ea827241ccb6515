"""The way of every run, in training and in fine-tuning: take a folder, train from where it stopped, end or stop."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rmoe.errors import RequestError, RunError, Stopped
from rmoe.records import Record, write_record
from rmoe.training import resume
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.loop import Loop
from rmoe.training.place import say
from rmoe.training.run_folder import locked, refuse_used

T = TypeVar("T")
DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})


@contextmanager
def disk_trouble(out: Path) -> Iterator[None]:
    """Say in one line what a disk that is full or broken has left of a run.

    Raises:
        RunError: in the place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        saved = CheckpointStore(out, "").saved()
        raise RunError(f"could not write {out}: {error}", saved, "free disk space, then --resume") from error


def enter(stack: ExitStack, out: Path, file: str, record: Record, same: Callable[[], T] | None) -> T | None:
    """Take a run's folder: lock it, and either begin a run in it or make sure it is this one. Collective.

    The first rank does it; what it finds wrong is raised on every rank.

    Args:
        stack: holds the lock.
        file: the first that a run writes, with what was asked for.
        record: what is asked for now.
        same: of a run that is resumed: refuses another run's record, if there is one.

    Returns:
        What `same` returns; None for a run that begins.
    """

    def take() -> T | None:
        stack.enter_context(locked(out))
        if same is not None and (out / file).exists():
            return same()
        refuse_used(out, file)
        write_record(out / file, record)
        return None

    return on_first_rank(take)


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something on the first rank alone; what it returns, or finds wrong, every rank gets. Collective.

    Raises:
        RequestError: the action's, on every rank.
    """
    said: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            said = [action(), None]
        except RequestError as error:
            said = [None, (error.field, error.value, error.allowed)]
    broadcast_object_list(said)
    if said[1] is not None:
        raise RequestError(*said[1])
    found: T = said[0]
    return found


def carry_out(loop: Loop, resumed: bool) -> None:
    """Train to the last step, saving and stopping where a signal asks for it.

    Args:
        resumed: from the newest valid checkpoint; at step 0 where there is none.

    Raises:
        RunError: it diverged.
        Stopped: SIGTERM or SIGINT ended it after a checkpoint.
    """
    checkpoint = _found(loop) if resumed else None
    with _signals(loop):
        loop.run(checkpoint)
    step, saved = loop.step, loop.store.saved(loop.step)
    if loop.diverged:
        raise RunError(
            f"the loss or its gradient was not finite in {loop.skipped_batches} batches by step {step}",
            saved,
            "lower the learning rate in a new run; or --resume after this batch, with more "
            "--training.max-skipped-batches",
        )
    if loop.stopped and step < loop.plan.max_steps:
        raise Stopped(f"stopped at step {step} of {loop.plan.max_steps}; saved: {saved}; --resume goes on")


def _found(loop: Loop) -> Path | None:
    """The checkpoint to resume from, None for a start at step 0; metrics.jsonl is cut off there."""
    checkpoint = resume.newest(loop)
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if loop.is_main:
        loop.store.clear_staging()
        loop.metrics.truncate(step)
    if checkpoint is None:
        say(f"no valid checkpoint in {loop.store.checkpoints}: starting at step 0")
    else:
        say(f"resuming {loop.store.folder} at step {step} of {loop.plan.max_steps}")
    return checkpoint


@contextmanager
def _signals(loop: Loop) -> Iterator[None]:
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
