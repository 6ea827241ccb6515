"""Where a run computes and how: threads, determinism, device, precision, ranks; the Trainer's arguments for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from rmoe.compat import one_gpu
from rmoe.errors import RequestError, one_line
from rmoe.training.config import RunConfig


def say(text: str) -> None:
    """One line on stderr, from the first rank."""
    if PartialState().is_main_process:
        print(one_line(text), file=sys.stderr, flush=True)


@contextmanager
def torch_settings(config: RunConfig) -> Iterator[int]:
    """Threads and determinism for this run, put back afterwards; yields the number of threads."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for equal bits
        torch.use_deterministic_algorithms(True)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


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
        RequestError: no GPU, no bfloat16 there, a batch that cannot be shared out, or a tracker not installed.
    """
    training = config.training
    trackers = get_available_reporting_integrations()
    for name in config.logging.report_to:
        if name not in trackers:
            raise RequestError(
                "logging.report_to", name, f"installed trackers: {', '.join(trackers) or 'none'}"
            )
    gpu = torch.cuda.is_available()
    if training.device == "cuda" and not gpu:
        raise RequestError("training.device", "cuda", "cpu or auto: torch sees no GPU here")
    cpu = training.device == "cpu" or not gpu
    if training.precision == "bf16" and not cpu and not torch.cuda.is_bf16_supported():
        raise RequestError("training.precision", "bf16", "fp32: this GPU has no bfloat16")
    bf16 = training.precision == "bf16" or (
        training.precision == "auto" and not cpu and torch.cuda.is_bf16_supported()
    )
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


def training_arguments(config: RunConfig, out: Path, place: Place) -> TrainingArguments:
    training = config.training
    share = training.batch_size // place.ranks.data
    staged = place.ranks.staged  # a pipeline cuts up its batch itself
    micro = share if staged or training.micro_batch_size is None else training.micro_batch_size
    schedule = {
        "constant": ("constant_with_warmup", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr": training.min_learning_rate}),
        "linear": ("polynomial", {"lr_end": training.min_learning_rate, "power": 1.0}),
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": training.decay_steps,
                "decay_type": "linear",
                "min_lr_ratio": training.min_learning_rate / training.learning_rate,
            },
        ),
    }[training.schedule]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=training.max_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule[0],
        lr_scheduler_kwargs=schedule[1],
        warmup_steps=training.warmup_steps,
        optim="adamw_torch_fused",
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        use_cpu=place.cpu,
        bf16=place.bf16,
        torch_compile=training.compile,
        logging_strategy="steps",
        logging_steps=config.logging.every,
        logging_nan_inf_filter=False,  # it would log NaN as 0 and go on
        eval_strategy="steps",
        eval_steps=config.evaluation_interval,
        save_strategy="steps",
        save_steps=config.checkpoint_interval,
        dataloader_drop_last=True,
        dataloader_pin_memory=not place.cpu,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        report_to=list(config.logging.report_to) or "none",
        disable_tqdm=True,
    )
    one_gpu(arguments)
    return arguments
