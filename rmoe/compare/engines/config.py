"""`[engine]`: where the runs of a grid are carried out, and what each of them gets. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from rmoe.errors import RequestError
from rmoe.training.config import read_preset
from rmoe.validation import AtLeastOne, NotNegativeInt, build, check_fields, require

Kind = Literal["local", "ray", "slurm"]
_MOST = sys.float_info.max
# Slurm counts whole minutes, and takes 0 as no limit.
Hours = Annotated[
    float, Meta(ge=1 / 60, le=_MOST, description="1/60, which is a minute, or more, and finite")
]

_KINDS: dict[str, tuple[Kind, ...]] = {
    "runs_per_gpu": ("local",),
    "shared": ("ray",),
    "fetch": ("ray",),
    "address": ("ray",),
    "partition": ("slurm",),
    "hours": ("slurm",),
    "submitit": ("slurm",),
    "at_once": ("ray", "slurm"),
}
"""Fields that not every kind of engine reads, and those that do."""


@dataclass(frozen=True)
class EngineConfig:
    """Where the runs are carried out. None of it changes a result.

    Attributes:
        kind: local: processes of this machine; ray: a Ray cluster; slurm: one job array.
        cpus: cores of each run; default the threads of a run.
        gpus: GPUs of each run; default as many as its layout (`parallel`) has processes, none without a GPU.
        memory_gib: of each run; ray places by it, slurm enforces it.
        runs_per_gpu: local: runs that share a GPU.
        retries: how often a run whose process or machine died is started again, from its last checkpoint.
        setup: shell lines before a run's process starts: `module load cuda`. May be given several times.
        shared: a folder that every machine sees, with --out in it; default --out itself. Checked by a written token.
        fetch: ray without a shared folder: bring each run's folder back when it ends, `result` or with the `model`.
            What a lost machine has trained is then lost.
        address: ray: of a running cluster, HOST:PORT; default is one of this machine, for this grid.
        node: machine on which each router is timed alone; default is any.
        partition: slurm.
        hours: slurm: time limit of a run's job; one that reaches it saves and is queued again.
        at_once: ray, slurm: runs at the same time, at most.
        submitit: slurm: submitit's cluster; `local` runs the jobs as processes of this machine.
    """

    kind: Kind = "local"
    cpus: AtLeastOne | None = None
    gpus: NotNegativeInt | None = None
    memory_gib: Annotated[float, Meta(gt=0, le=_MOST, description="above 0, and finite")] | None = None
    runs_per_gpu: AtLeastOne = 1
    retries: NotNegativeInt = 2
    setup: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    shared: str | None = None
    fetch: Literal["no", "result", "model"] = "no"
    address: str | None = None
    node: str | None = None
    partition: str | None = None
    hours: Hours = 24.0
    at_once: AtLeastOne | None = None
    submitit: Literal["slurm", "local"] = "slurm"

    def __post_init__(self) -> None:
        check_fields(self, "engine")

    def require_read(self, given: Iterable[str]) -> None:
        """Refuse options of a command line that this kind of engine does not read; a preset's table may have them.

        Raises:
            RequestError: one is among `given`, names of fields.
        """
        for name in given:
            value = getattr(self, name, None)
            if name in _KINDS and self.kind not in _KINDS[name] and value is not None:
                allowed = f"unset with --engine {self.kind}"
                raise RequestError(f"engine.{name}", value, allowed)

    def require_jobs(self, jobs: int | None) -> None:
        """Check `--jobs`, runs at once on this machine.

        Raises:
            RequestError: it is no number of runs, or the engine does not read it.
        """
        require(jobs is None or jobs >= 1, "--jobs", jobs, "1 or more")
        allowed = f"unset with --engine {self.kind}, where --engine.at-once limits the runs at the same time"
        require(jobs is None or self.kind == "local", "--jobs", jobs, allowed)

    @classmethod
    def from_preset(cls, name: str) -> EngineConfig:
        """The `[engine]` table of a preset; the default without a table, or without a preset (`""`).

        Raises:
            RequestError: no such preset, an unknown name in its table, or a value that is not allowed.
        """
        tables = read_preset(name) if name else {}
        return build(cls, tables.get("engine", {}), "engine")
