"""`rmoe finetune`: instructions or labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from rmoe.cli.models import Model, Plugins
from rmoe.errors import one_line
from rmoe.finetune.config import FinetuneConfig


def run(
    model: Model,
    *,
    data: Path,
    out: Path,
    settings: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = FinetuneConfig(),  # noqa: B008 - frozen
    resume: bool = False,
    plugin: Plugins = (),
    json: bool = False,
) -> None:
    """Fine-tune a model: the answers of instructions, or the labels of texts. Writes OUT/model.

    Args:
        data: rows as JSON lines, a JSON array, csv or parquet: `instruction`, `input`, `output`; conversations as
            `messages` or ShareGPT's `conversations`, in the tokenizer's chat template; or `text`, `label`.
        out: the run's folder: new, empty, or with --resume the run to go on with.
        settings: see the table below.
        resume: go on from the newest valid checkpoint in --out.
        json: print the result as JSON.
    """
    import msgspec

    from rmoe.cli.models import set_up
    from rmoe.finetune.run import finetune
    from rmoe.places import model_folder

    set_up(plugin)
    result = finetune(model_folder(model), data, out, settings, resume=resume)
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks for all
        return
    if json:
        print(msgspec.json.encode(result).decode())
        return
    figures = "".join(f", {name} {value:.4f}" for name, value in result.scores.items())
    print(
        one_line(
            f"{result.model}: {result.steps} steps on {result.examples} examples, "
            f"{result.trained_parameters:,} parameters trained{figures}"
        )
    )
