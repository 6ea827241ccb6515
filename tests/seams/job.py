"""What a job is, and the table of them. A job is a function that uses a model as people do and raises on failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.seams.families import Family

Function = Callable[[Family, Path], None]


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Attributes:
        group: section of docs/seams.md.
        title: what is done, in a reader's words.
        slow: runs under `make test-all` only.
        needs: packages (with a version, where it matters) without which it is skipped.
    """

    name: str
    group: str
    title: str
    function: Function
    slow: bool = False
    needs: tuple[str, ...] = ()


JOBS: dict[str, Job] = {}


def job(
    group: str, title: str, *, slow: bool = False, needs: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Enter a function into the table under its own name."""

    def enter(function: Function) -> Function:
        name = function.__name__
        assert name not in JOBS, name
        JOBS[name] = Job(name, group, title, function, slow, needs)
        return function

    return enter
