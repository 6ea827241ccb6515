"""`rmoe train`: one model, from a preset and what overrides it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tyro

from rmoe.errors import one_line
from rmoe.training.config import RunConfig


def run(
    *,
    out: Path,
    config: Annotated[RunConfig, tyro.conf.arg(name="")],
    resume: bool = False,
    profile: bool = False,
    branch_of: Path | None = None,
) -> None:
    """Train one model; writes config.json, metrics.jsonl, checkpoints/, model/ and result.json into --out.

    --data PATH and --seed N are short for --data.path and --training.seed.
    SIGTERM or Ctrl-C saves a checkpoint, stops, and exits with 0: --resume goes on from there.

    Args:
        out: the run's folder: new, empty, or with --resume the run to go on with.
        config: see the tables below.
        resume: go on from the newest valid checkpoint in --out, bit for bit. Without --preset the settings are
            those of the run there, but for --plugin and --data.cache-dir, which are given again: a folder decides
            neither which code runs nor where else is written.
        profile: also record three steps: a trace and a page of where their time went, in OUT/profile.
        branch_of: folder of a longer run with --training.schedule wsd and the same settings, which kept a checkpoint
            where this run's decay begins (--training.branch-points): begin there.
    """
    from rmoe.training.run import train

    result = train(config, out, resume=resume, profile=profile, branch_of=branch_of)
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks for all
        return
    unit = result.corpus.unit.replace("_", " ")
    measured = [("validation", result.val, result.context), ("test", result.test, result.test_context)]
    if result.averaged is not None:
        measured.append(("test of averaged weights", result.averaged.test, result.test_context))
    figures = [f"{name} {value:.4f}{_part(context)}" for name, value, context in measured if value]
    print(one_line(f"{result.router}: {', '.join(figures)} {unit}; model in {result.model}"))


def _part(context: str | None) -> str:
    """How much of its split a figure is of, in brackets; nothing where that is all of it."""
    part = (context or "").partition("; ")[2]
    return f" ({part})" if part else ""
