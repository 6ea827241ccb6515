"""`rmoe eval`: how well a model predicts a text."""

from __future__ import annotations

import json as jsonlib
import math
from pathlib import Path

import tyro

from rmoe.errors import RequestError


def run(
    model: tyro.conf.Positional[Path],
    *,
    data: str,
    context: int | None = None,
    overlap: int = 1,
    json: bool = False,
) -> None:
    """Bits per byte and perplexity of a model on a whole text.

    Args:
        model: a model folder, or the folder of a finished run.
        data: a text file, a folder of texts, a .gz or .jsonl of text, or hf:NAME.
        context: tokens of one forward pass; default what the model was trained with, at most 4096.
        overlap: tokens each pass repeats from the one before, so that every token is predicted from at least so
            many; 1 is the cheapest and the harshest.
        json: print one JSON object.
    """
    if context is not None and context < 2:
        raise RequestError("--context", context, "2 or more")

    import rmoe
    from rmoe.cli.models import model_folder
    from rmoe.data import DataConfig, prepare
    from rmoe.training.evaluation import evaluate

    folder = model_folder(model)
    language_model = rmoe.load(folder)
    if context is None:
        context = min(getattr(language_model.config, "max_position_embeddings", 4096), 4096)
    corpus = prepare(DataConfig(path=data, tokenizer=str(folder), split="whole"), context)
    evaluation = evaluate(language_model, corpus.blocks("test", overlap))
    split = corpus.manifest.splits["test"]
    figures = {
        "bits_per_byte": evaluation.loss * split.tokens / split.bytes / math.log(2),
        "perplexity_per_token": math.exp(min(evaluation.loss, 700.0)),
        "loss_nats_per_token": evaluation.loss,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "context": evaluation.context,
        "model": str(folder),
        "data": corpus.manifest.source.name,
    }
    if json:
        print(jsonlib.dumps(figures, indent=2))
        return
    print(
        f"{figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity_per_token']:.3f} per token "
        f"over {split.tokens:,} tokens ({split.bytes:,} bytes); each predicted from {evaluation.context}"
    )
