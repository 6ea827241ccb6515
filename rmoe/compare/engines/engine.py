"""The interface of an engine: jobs go in by name, answers come out as they are there. Imports no torch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec


class Job(Protocol):
    """A plain picklable record that can be carried out anywhere its class can be imported.

    Carried out twice it must give the same value: a job whose process or node died is started again.
    """

    def carry_out(self) -> Any:
        """Do it, in a process of its own; the value must be picklable."""


@dataclass(frozen=True)
class Wants:
    """What one job needs.

    Attributes:
        cpus: cores.
        gpus: devices, pinned by `CUDA_VISIBLE_DEVICES`.
        processes: that it runs as; above 1 the engine starts `torchrun`.
        memory_gib: None does not say.
        node: the machine it must run on, by the name its engine knows; None is any.
        alone: with nothing else on that machine.
    """

    cpus: int = 1
    gpus: int = 0
    processes: int = 1
    memory_gib: float | None = None
    node: str | None = None
    alone: bool = False


class Failed(Exception):
    """A job inside this one has failed; its line is this one's, as it is."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`value` when it worked, else `error` in one line.

    Attributes:
        stopped: it was told to end and has saved; it can be submitted again.
        lost: its process or its node died.
    """

    value: Any = None
    error: str | None = None
    stopped: bool = False
    lost: bool = False


def named(what: str, *request: object) -> str:
    """A job's name that says what is asked for: Slurm finds a job of an earlier call again by its name."""
    return f"{what}-{hashlib.sha256(msgspec.json.encode(request)).hexdigest()[:8]}"


class Engine(ABC):
    """Carries jobs out. Leaving its `with` block ends what still runs, which saves first.

    Attributes:
        at_once: jobs of this grid that can run at the same time, in words.
    """

    at_once: str

    @abstractmethod
    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        """Submit all jobs and give their answers as they come, in any order.

        Args:
            jobs: name -> job. An engine that outlives this process finds its jobs again by these names.
            wants: of each of them.

        Raises:
            RequestError: no part of the engine has what the jobs want; nothing was submitted.
        """

    @abstractmethod
    def close(self, interrupted: bool) -> None:
        """End what still runs and wait until it has saved; where jobs outlive this process, leave them be.

        Args:
            interrupted: by Ctrl-C, which is worth a line to the one who waits.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(isinstance(error, KeyboardInterrupt))
