"""A small RMoE classifier from random weights, beside the majority class and a bag of words.

    python -m benchmarks.classification --train sst2_train.jsonl.gz --dev sst2_dev.jsonl.gz [--out benchmarks/results]

Reads bytes, has seen no other text, and is trained as `rmoe finetune --task classification` does. The bag of words is
scikit-learn's logistic regression on counts of words, with its defaults: what a small model has to be measured against.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.results import write_result
from experiments.classifier_study import bag_of_words
from rmoe.data.encode import byte_tokenizer
from rmoe.data.tasks import Labelled, read_tasks
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.run import finetune
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize


def small_model(seed: int) -> RMoEForCausalLM:
    """3 layers of width 96, 4 experts, top-2, router `rmoe`."""
    config = RMoEConfig(
        vocab_size=320,
        hidden_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=3,
        num_experts=4,
        router="rmoe",
        max_position_embeddings=256,
    )
    model = RMoEForCausalLM(config)
    initialize(model, seed)
    return model


def main() -> None:
    """Train, print, and with --out keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for a dated result")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    arguments = parser.parse_args()

    by_seed = []
    for seed in range(arguments.seeds):
        settings = FinetuneConfig(
            task="classification",
            valid=arguments.dev,
            epochs=arguments.epochs,
            batch_size=32,
            sequence_length=128,
            learning_rate=1e-3,
            seed=seed,
            threads=1,
        )
        with tempfile.TemporaryDirectory() as folder:
            start = Path(folder, "start")
            small_model(seed).save_pretrained(start)
            byte_tokenizer().save_pretrained(start)
            by_seed.append(finetune(start, arguments.train, Path(folder, "run"), settings).scores)
        print(f"seed {seed}: {by_seed[-1]}", flush=True)

    figures = {
        "train": {"file": arguments.train.name, "items": len(read_tasks(arguments.train, Labelled))},
        "dev": {"file": arguments.dev.name, "items": len(read_tasks(arguments.dev, Labelled))},
        "epochs": arguments.epochs,
        "rmoe_by_seed": by_seed,
        "bag_of_words": bag_of_words(arguments.train, arguments.dev),
    }
    write_result("classification", figures, arguments.out)


if __name__ == "__main__":
    main()
