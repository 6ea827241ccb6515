"""From the `[engine]` table to an engine. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from rmoe.compare.engines.config import EngineConfig
from rmoe.compare.engines.devices import require_here, slots_of
from rmoe.compare.engines.engine import Engine, Wants
from rmoe.compare.engines.local import LocalEngine
from rmoe.errors import RequestError


def engine_of(config: EngineConfig, out: Path, wants: Wants, jobs: int | None, threads: int) -> Engine:
    """The engine a grid asks for.

    Args:
        config: its `[engine]` table.
        out: the grid's folder.
        wants: of each of its runs.
        jobs: runs at once on this machine; None is as many as its GPUs take.
        threads: of each process of a run.

    Raises:
        RequestError: it is not installed, does not answer, or has not what a run wants.
    """
    if config.fetch != "no" and (config.kind != "ray" or config.shared is not None):
        raise RequestError("engine.fetch", config.fetch, "no, but with --engine ray and no engine.shared")
    if config.kind == "ray":
        from rmoe.compare.engines.ray import RayEngine

        return RayEngine(config, out, wants, threads)
    if config.kind == "local" or config.submitit == "local":
        require_here(config.cpus, config.memory_gib)
    if config.kind == "slurm":
        from rmoe.compare.engines.slurm import SlurmEngine

        return SlurmEngine(config, out, wants, threads)
    if config.node not in (None, os.uname().nodename):
        raise RequestError("engine.node", config.node, f"{os.uname().nodename} with --engine local")
    gpus = wants.gpus
    slots = slots_of(jobs, gpus, config.runs_per_gpu) if gpus else [[] for _ in range(jobs or 1)]
    return LocalEngine(slots, threads, out / "logs", config.retries, config.setup, journal=out)
