"""What a fine-tuning run is asked for. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rmoe.errors import RequestError
from rmoe.training.config import CheckpointConfig, LoggingConfig, RunConfig, TrainingConfig, require

MOST_EPOCHS = 1_000_000
TRAINING_OPTIONS = {option.name for option in fields(TrainingConfig)}
"""Of these, the ones that `FinetuneConfig` has too mean the same there."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Defaults are the paper's: 3 epochs, batch 128, 2e-5 with warm-up and cosine, no weight decay.

    Attributes:
        task: `instruction` learns the answers of Alpaca-format lines, `classification` the labels of texts.
        valid: a file of the same form, evaluated while training and at the end.
        freeze: what of the routers stays as it is; `router` is each layer's own part, the cell is shared.
        train: everything, or the router alone: `router` is a graft's projectors, cell and `B` (of an RMoE
            model all of its router), `router+gate` the family's gates too.
        lora_rank: train low-rank adapters on attention and experts instead of their weights; 0 is off.
        lora_alpha: scale of the adapters; None is twice the rank.
        epochs: passes over the data.
        batch_size: sequences of an optimizer step, all of them if there are fewer; a packed sequence holds
            several examples.
        micro_batch_size: sequences of one forward pass; None is all of a device's share.
        sequence_length: tokens of a sequence; longer examples are cut.
        packing: several examples to a sequence, each seeing itself alone.
        learning_rate: the peak.
        warmup_ratio: share of the steps in which it grows from 0; the last step is after it.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        seed: of the order, dropout, and new parameters.
        threads: CPU threads of torch; None is torch's own choice.
        device: `auto` takes a GPU where there is one.
        precision: `auto` is bfloat16 mixed precision on a GPU that has it, float32 elsewhere. Weights are
            trained in float32 and saved in the dtype they came in. With LoRA those that are not trained stay
            in half precision if they came in it, and then it is always bfloat16 mixed precision.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        deterministic: the same bits each time; some families' layers have no such kernel on a GPU.
    """

    task: Literal["instruction", "classification"] = "instruction"
    valid: Path | None = None
    freeze: Literal["none", "router", "router+cell"] = "none"
    train: Literal["all", "router", "router+gate"] = "all"
    lora_rank: int = 0
    lora_alpha: int | None = None
    epochs: float = 3.0
    batch_size: int = 128
    micro_batch_size: int | None = None
    sequence_length: int = 512
    packing: bool = True
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    seed: int = 0
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    deterministic: bool = True

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        require(0 < self.epochs <= MOST_EPOCHS, "--epochs", self.epochs, f"above 0, at most {MOST_EPOCHS:,}")
        require(0 <= self.warmup_ratio < 1, "--warmup-ratio", self.warmup_ratio, "0 to below 1")
        require(self.lora_rank >= 0, "--lora-rank", self.lora_rank, "0 or more")
        require(self.lora_alpha is None or self.lora_alpha > 0, "--lora-alpha", self.lora_alpha, "1 or more")
        used = self.lora_alpha is None or self.lora_rank > 0
        require(used, "--lora-alpha", self.lora_alpha, "unset without --lora-rank")
        packed = self.packing or self.task == "instruction"
        require(
            packed,
            "--packing",
            self.packing,
            "left out with --task classification, whose texts are not packed",
        )
        alone = self.train == "all" or (self.freeze == "none" and not self.lora_rank)
        require(alone, "--train", self.train, "all, together with --freeze or --lora-rank")
        self.run_config(self.batch_size)  # the rest is checked there

    def run_config(self, num_sequences: int, processes: int = 1) -> RunConfig:
        """As a training run over so many sequences, which so many processes share.

        A step has no more sequences than there are, but one for each process.

        Raises:
            RequestError: a value that is not allowed.
        """
        batch, micro = self.batch_size, self.micro_batch_size
        if num_sequences < batch:
            share = max(1, num_sequences // processes)
            micro = micro and min(micro, share)
            batch = share // (micro or 1) * (micro or 1) * processes
        steps = max(1, math.ceil(self.epochs * num_sequences / batch))
        values = asdict(self) | {"batch_size": batch, "micro_batch_size": micro}
        try:
            training = TrainingConfig(
                max_steps=steps,
                warmup_steps=min(math.ceil(self.warmup_ratio * steps), steps - 1),
                **{name: value for name, value in values.items() if name in TRAINING_OPTIONS},
            )
        except RequestError as error:
            option = error.field.removeprefix("training.").replace("_", "-")
            raise RequestError(f"--{option}", error.value, error.allowed) from None
        logging = LoggingConfig(every=max(1, steps // 50))
        return RunConfig(training=training, logging=logging, checkpoints=CheckpointConfig())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"valid": None if self.valid is None else str(self.valid)}
