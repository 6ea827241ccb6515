"""Where a run computes and how: threads, determinism, device, precision, ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from rmoe.compat import forget_accelerators, kept_accelerators
from rmoe.errors import RequestError, one_line
from rmoe.parallel.sharding import require_own_layout
from rmoe.training.config import RunConfig

_DETERMINISTIC: Any = torch.utils.deterministic  # type checkers do not know its property
FILL_UNINITIALIZED = False
"""Whether deterministic training fills the memory it allocates with NaN, torch's default.

Nothing here reads memory before writing it: with filling, the bits are the same (`tests/training/test_run.py`).
It costs 3% of a step on a CPU, and a kernel launch for each allocation on a GPU.
"""


def say(text: str) -> None:
    """One line on stderr, from the first rank."""
    if PartialState().is_main_process:
        print(one_line(text), file=sys.stderr, flush=True)


@contextmanager
def torch_settings(config: RunConfig) -> Iterator[int]:
    """Threads, determinism and silence for this run; yields the number of threads.

    They are put back afterwards, and so is what accelerate keeps for the whole process: a program that trains has its
    own Accelerator and progress bars again.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _DETERMINISTIC.fill_uninitialized_memory
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for equal bits
        torch.use_deterministic_algorithms(True)
        _DETERMINISTIC.fill_uninitialized_memory = FILL_UNINITIALIZED
    bars, bars_of_hub = is_progress_bar_enabled(), not are_progress_bars_disabled()
    disable_progress_bar()  # transformers' own, one for each file it writes
    try:
        with kept_accelerators():
            yield torch.get_num_threads()
    finally:
        if bars:
            enable_progress_bar()
        if not bars_of_hub:  # of huggingface_hub, which transformers switches with its own
            disable_progress_bars()
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _DETERMINISTIC.fill_uninitialized_memory = filled


class Ranks(msgspec.Struct, frozen=True):
    """The processes of a run, and which of them see which sequences.

    Those of a tensor-parallel group and the stages of a pipeline work together on the same sequences: they are
    neighbours, `same` of them. `Ranks()` is one process alone.
    """

    world: int = 1
    rank: int = 0
    same: int = 1
    staged: bool = False  # they are stages of a pipeline

    @property
    def data(self) -> int:
        """Groups of processes that see different sequences."""
        return self.world // self.same

    @property
    def data_rank(self) -> int:
        """Which of these groups this process is in."""
        return self.rank // self.same

    @property
    def speaks(self) -> bool:
        """Whether this process's sums count: of those that see the same, one's; of stages the last, with the loss."""
        return self.rank % self.same == (self.same - 1 if self.staged else 0)


class Place(msgspec.Struct, frozen=True):
    """Where and how precisely to compute."""

    cpu: bool
    bf16: bool
    ranks: Ranks


def place_of(config: RunConfig) -> Place:
    """Resolve device and precision.

    Raises:
        RequestError: no GPU, no bfloat16 there, sharding by accelerate, a batch that cannot be shared out, or a
            tracker not installed.
    """
    require_own_layout()
    training = config.training
    trackers = sorted(str(tracker) for tracker in get_available_trackers())
    for name in config.logging.report_to:
        if name not in trackers:
            raise RequestError(
                "logging.report_to", name, f"installed trackers: {', '.join(trackers) or 'none'}"
            )
    gpu = torch.cuda.is_available()
    if training.device == "cuda" and not gpu:
        raise RequestError("training.device", "cuda", "cpu or auto: torch sees no GPU here")
    cpu = training.device == "cpu" or not gpu
    # Without emulation: with it a GPU that has no bfloat16 says yes.
    has_bf16 = training.precision != "fp32" and (
        cpu or torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if training.precision == "bf16" and not has_bf16:
        raise RequestError("training.precision", "bf16", "fp32: this GPU has no bfloat16")
    bf16 = has_bf16 and (training.precision == "bf16" or not cpu)
    forget_accelerators()
    state, parallel = PartialState(cpu=cpu), config.parallel
    parallel.require_processes(state.num_processes)
    ranks = Ranks(state.num_processes, state.process_index, parallel.same_data, parallel.pipeline > 1)
    if training.batch_size % ranks.data:
        raise RequestError(
            "training.batch_size", training.batch_size, f"a multiple of {ranks.data} processes"
        )
    share = training.batch_size // ranks.data
    if training.micro_batch_size is not None and share % training.micro_batch_size:
        raise RequestError(
            "training.micro_batch_size", training.micro_batch_size, f"a divisor of {share}, a process's share"
        )
    return Place(cpu, bf16, ranks)


def accelerator_of(config: RunConfig, out: Path, place: Place, unused: bool) -> Accelerator:
    """accelerate's view of this process: device, precision, DDP, compilation, trackers; nothing from its environment.

    Args:
        out: trackers that write files do so in `out/runs`.
        unused: let DDP look for parameters without a gradient.
    """
    return Accelerator(
        cpu=place.cpu,
        mixed_precision="bf16" if place.bf16 else "no",
        dynamo_backend="inductor" if config.training.compile else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop does it
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=unused,
                # Equal on all ranks, but for the key of the routing noise, which must not be.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,  # no second copy of what has been reduced
            )
        ],
        log_with=list(config.logging.report_to) or None,
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "runs")),
    )


def micro_batches(config: RunConfig, ranks: Ranks) -> int:
    """Forward passes of a process in a step, where it has no stage of a pipeline."""
    share = config.training.batch_size // ranks.data
    return share // (config.training.micro_batch_size or share)
