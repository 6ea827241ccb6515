"""`DIR/engine/journal.jsonl`: what became of a grid's jobs, on whichever engine. Imports no torch.

A line is appended at every change of state; the last one of a name stands. It is how `rmoe compare`, called again,
finds jobs that outlived it, and how `rmoe runs` knows of runs that have no folder yet.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from rmoe.compare.engines.engine import Answer
from rmoe.records import Record, append_records, read_lines

JOURNAL = Path("engine") / "journal.jsonl"

JobState = Literal["queued", "answered", "failed", "lost", "stopped"]


class Entry(Record, frozen=True, kw_only=True):
    """A job's state.

    Attributes:
        engine: what carries it out.
        id: the engine's own name for it; None where it has none that outlives this process.
        at: seconds since 1970.
        driver: process that waits for the answer, `PID HOST`; without it local and ray jobs are gone.
    """

    name: str
    state: JobState
    engine: str
    id: str | None = None
    at: float
    driver: str | None = None

    @property
    def key(self) -> str:
        return self.name


def state_of(answer: Answer) -> JobState:
    """The state of a job that has answered."""
    if answer.stopped:
        return "stopped"
    if answer.lost:
        return "lost"
    return "answered" if answer.error is None else "failed"


def note(out: Path, name: str, state: JobState, engine: str, id: str | None = None) -> None:
    """Append a line."""
    path = out / JOURNAL
    path.parent.mkdir(parents=True, exist_ok=True)
    driver = f"{os.getpid()} {os.uname().nodename}"
    entry = Entry(name=name, state=state, engine=engine, id=id, at=round(time.time(), 3), driver=driver)
    append_records(path, entry)


def read_journal(out: Path) -> dict[str, Entry]:
    """Name -> its last line; a line that a kill cut short is passed over."""
    path = out / JOURNAL
    if not path.exists():
        return {}
    entries, _ = read_lines(path, lambda line, _: msgspec.json.decode(line, type=Entry))
    return {entry.name: entry for entry in entries}
