"""The card of a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rmoe.finetune.config import FinetuneConfig
from rmoe.model.card import Metric, ModelCard, stated_license
from rmoe.places import display_name

if TYPE_CHECKING:
    from rmoe.finetune.run import FinetuneResult

_LOAD = {
    "instruction": "import rmoe\n\nmodel = rmoe.load(folder)",
    "classification": (
        "import rmoe.graft  # makes rmoe's model types known to transformers\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        "model = AutoModelForSequenceClassification.from_pretrained(folder)"
    ),
}


def finetuning_card(
    source: Path, data: Path, config: FinetuneConfig, result: FinetuneResult, data_sha256: str
) -> ModelCard:
    """Base model, data, what was trained, metrics and how to load it.

    Args:
        source: the folder of the model it was made from; the licence its card states is passed on.
        data: the task file.
        data_sha256: of the task file.
    """
    labels = config.task == "classification"
    return ModelCard(
        title=f"{display_name(source)}-{config.task}",
        summary=(
            f"{display_name(source)}, fine-tuned on {'labelled texts' if labels else 'instructions'} "
            f"for {result.steps:,} steps. It has had no evaluation beyond the metrics below."
        ),
        data=data.name,
        metrics=tuple(
            Metric(split="validation", unit=name, value=value) for name, value in result.scores.items()
        ),
        load=_LOAD[config.task],
        task="text-classification" if labels else "text-generation",
        base=display_name(source),
        license=stated_license(source),
        tables={
            "Data": {"file": data.name, "sha256": data_sha256, "examples": f"{result.examples:,}"},
            "Training": {
                "trained": f"{config.train}, {result.trained_parameters:,} parameters",
                "frozen": config.freeze,
                "LoRA rank": config.lora_rank or "-",
                "epochs": config.epochs,
                "batch": f"{config.batch_size} x at most {config.sequence_length} tokens",
                "learning rate": config.learning_rate,
                "seed": config.seed,
            },
        },
    )
