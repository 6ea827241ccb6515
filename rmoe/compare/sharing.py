"""How many runs share a machine, and with how many threads each. Imports no torch.

The number of threads decides the order in which sums are taken, so it belongs to a run's configuration and does not
follow from how many runs share the machine: a grid gives the same bits with `--jobs 1` and `--jobs 8`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rmoe.compare.engines.config import EngineConfig
from rmoe.compare.engines.devices import SIMULATED, cores
from rmoe.compare.engines.engine import Wants
from rmoe.errors import RequestError
from rmoe.training.config import ModelConfig, RunConfig, TrainingConfig

# Multiply-adds of one layer's matrix products on one micro-batch, below which runs share the machine with one thread
# each. Measured on two cores by benchmarks/sharing.py (its dated results, part `steps`): two runs with one thread each
# make more steps per second than one with two threads at every size tried, 1.59 times as many at the quick preset's
# (2**26), 1.13 to 1.34 times from 2**28 to 2**33. There is no size where it turns; this is the first power of two above
# what was tried, and beyond it what a second run needs is memory.
SMALL_STEP = 2**34


@dataclass(frozen=True)
class Sharing:
    """Runs at once on this machine (None: as many as its GPUs take), and threads of each."""

    jobs: int | None
    threads: int


def place(config: RunConfig, engine: EngineConfig, jobs: int | None, on_gpu: bool) -> tuple[Wants, Sharing]:
    """What each run of a grid gets, and how many share this machine.

    Args:
        jobs: asked for; None takes the default for the size.
        on_gpu: this machine has GPUs, and the runs may use them.

    Raises:
        RequestError: the layout is none for so many GPUs, or the batch cannot be shared out.
    """
    parallel, training = config.parallel, config.training
    gpus_here = on_gpu or (engine.kind == "local" and SIMULATED in os.environ)
    processes = parallel.processes
    if engine.gpus is not None and engine.gpus > 0:
        parallel.require_processes(engine.gpus)
        processes = engine.gpus
    gpus = engine.gpus if engine.gpus is not None else processes if gpus_here else 0
    data = processes // parallel.same_data
    if training.batch_size % data:
        raise RequestError(
            "training.batch_size", training.batch_size, f"a multiple of {data}, the processes of a run"
        )
    sharing = share(config.model, training, jobs, gpus > 0, processes)
    cpus = engine.cpus or sharing.threads * processes
    return Wants(cpus=cpus, gpus=gpus, processes=processes, memory_gib=engine.memory_gib), sharing


def share(
    model: ModelConfig, training: TrainingConfig, jobs: int | None, on_gpu: bool, processes: int = 1
) -> Sharing:
    """Threads a run, and runs at once.

    Args:
        jobs: asked for; None takes the default for the size, on GPUs as many as they take.
        on_gpu: the runs compute on GPUs, which are then what they share.
        processes: of each run.
    """
    small = step_work(model, training) < SMALL_STEP
    threads = training.threads or (1 if small or on_gpu or processes > 1 else cores())
    if jobs is None and not on_gpu:
        jobs = max(1, cores() // (threads * processes))
    return Sharing(jobs=jobs, threads=threads)


def step_work(model: ModelConfig, training: TrainingConfig) -> int:
    """Multiply-adds of the matrix products of one layer on one micro-batch, forward."""
    tokens = (training.micro_batch_size or training.batch_size) * training.sequence_length
    matrices = 3 if model.mlp_gated else 2
    experts = matrices * model.hidden_size * model.moe_intermediate_size * model.num_experts_per_tok
    return tokens * (4 * model.hidden_size**2 + experts)
