"""What runs there are, and how they fare, read from their folders alone. Imports no torch.

A run is a folder with the `config.json` of a run. Whether its process lives is asked of the kernel: a running process
holds the lock of `run.lock`, and the lock of one that died is free, however it died.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rmoe.errors import RequestError
from rmoe.records import Record
from rmoe.training.config import RunConfig
from rmoe.training.metrics import Row, read_metrics
from rmoe.training.run_folder import CONFIG, LOCK, METRICS, RESULT, checkpoints_of, read_run

State = Literal["running", "finished", "stopped", "died", "not begun", "queued", "lost"]


class RunStatus(Record, frozen=True, kw_only=True):
    """One run.

    Attributes:
        state: running; finished; stopped, with a checkpoint of its last step; died, without one; not begun. Of a grid
            also queued, and lost: nothing carries it out any more.
        step, steps: done, and to do in all.
        loss: of the last training row, nats per token. validation: of the last evaluation.
        tokens_per_s: of the last training row.
        seconds_left: at that rate; None unless running.
        quiet_s: since the last row was written.
        checkpoint: step of the newest checkpoint folder, not verified.
    """

    folder: str
    router: str
    seed: int
    state: State
    step: int
    steps: int
    loss: float | None = None
    validation: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    quiet_s: float | None = None
    checkpoint: int | None = None


def find_runs(root: Path, depth: int = 4) -> list[RunStatus]:
    """The runs below a folder, by path; what is not a run's folder is passed over.

    Raises:
        RequestError: there is no such folder.
    """
    if not root.is_dir():
        raise RequestError("ROOT", str(root), "a folder")
    found = []
    for folder in _folders(root, depth):
        try:
            found.append(status_of(folder))
        except RequestError:
            continue  # a model's config.json, or one that is damaged: nothing this command can say about it
    return found


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Folders with both a configuration and a lock, without going into runs."""
    for folder in folders_below(root, depth, lambda folder: (folder / CONFIG).is_file()):
        if (folder / CONFIG).is_file() and (folder / LOCK).exists():
            yield folder


def folders_below(root: Path, depth: int, is_leaf: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder and those below it, through links too, each once; nothing below a leaf."""
    seen: set[Path] = set()

    def walk(folder: Path, left: int) -> Iterator[Path]:
        place = folder.resolve()
        if place in seen:
            return
        seen.add(place)
        yield folder
        if left and not is_leaf(folder):
            try:
                entries = sorted(folder.iterdir())
            except OSError:  # not ours to read
                return
            for entry in entries:
                if entry.is_dir():
                    yield from walk(entry, left - 1)

    return walk(root, depth)


def status_of(folder: Path) -> RunStatus:
    """One run's status.

    Raises:
        RequestError: its configuration is not a run's.
    """
    config = RunConfig.from_dict(read_run(folder).config)
    training = config.training
    metrics = folder / METRICS
    rows = read_metrics(metrics) if metrics.exists() else []
    step = max((row["step"] for row in rows), default=0)
    checkpoint = max((step for step, path in checkpoints_of(folder) if path.is_dir()), default=None)
    state = _state(folder, step, checkpoint)
    rate = _last(rows, "train", "tokens_per_s")
    return RunStatus(
        folder=str(folder),
        router=config.router,
        seed=training.seed,
        state=state,
        step=step,
        steps=training.max_steps,
        loss=_last(rows, "train", "loss"),
        validation=_last(rows, "eval", "loss"),
        tokens_per_s=rate,
        seconds_left=seconds_left(config, step, rate) if state == "running" else None,
        quiet_s=max(time.time() - metrics.stat().st_mtime, 0.0) if metrics.exists() else None,
        checkpoint=checkpoint,
    )


def seconds_left(config: RunConfig, step: int, tokens_per_s: float | None) -> float | None:
    """Until a run's last step, at its present rate; None where that is not known."""
    if not tokens_per_s:
        return None
    training = config.training
    return (training.max_steps - step) * training.batch_size * training.sequence_length / tokens_per_s


def _last(rows: list[Row], kind: str, name: str) -> float | None:
    """A number of the last row of a kind."""
    value = next((row.get(name) for row in reversed(rows) if row.get("kind") == kind), None)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _state(folder: Path, step: int, checkpoint: int | None) -> State:
    if (folder / RESULT).exists():
        return "finished"
    if is_locked(folder):
        return "running"
    if checkpoint is None and step == 0:
        return "not begun"
    return "stopped" if checkpoint is not None and checkpoint >= step else "died"


def is_locked(folder: Path) -> bool:
    """Whether a process writes in a run's folder now."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
