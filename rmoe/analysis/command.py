"""From model folders to one `Analysis`: load, read with each model's tokenizer, measure together what can be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import rmoe
from rmoe.analysis.analyze import AnalysisOptions, Subject, analyze_models
from rmoe.analysis.reading import Part, Reading, read_text
from rmoe.errors import RequestError
from rmoe.moe import require_layers
from rmoe.places import display_name, model_place
from rmoe.results.analysis import Analysis, ModelAnalysis

SEQUENCE_LENGTH = 512


def analyze_folders(
    models: Sequence[str],
    data: str | None,
    part: Part | None,
    tokens: int,
    sequence_length: int | None,
    device: str | None,
    options: AnalysisOptions,
) -> Analysis:
    """Analyse one model, or two side by side.

    Two that read the same ids go through the text together, and with the same layers and experts their routing
    is compared token by token (saturation). Where that cannot be, a note says so and the rest is reported.

    Args:
        models: one or two model folders, run folders, or names of the Hub; see `rmoe.places.model_place`.
        data, part, tokens: see `reading.read_text`.
        sequence_length: S; None is `SEQUENCE_LENGTH`, or the models' longest if that is less.
        device: as torch names it; None is a GPU if there is one.
        options: sizes of the samples.

    Raises:
        RequestError: whatever is wrong with the models, the text or the options.
    """
    paths = [model_path(str(model_place(model))) for model in models]
    target = _device(device)
    loaded = [rmoe.load(path, device=target) for path in paths]
    for path, model in zip(paths, loaded, strict=True):
        if options.gradient_tokens and not model.can_generate():
            allowed = (
                f"a language model, not {type(model).__name__} (or --gradient-tokens 0: they need its loss)"
            )
            raise RequestError("MODEL", path, allowed)
    layers = [require_layers(model) for model in loaded]  # before anything slow
    vocabulary = [model.get_input_embeddings().weight.shape[0] for model in loaded]
    length = _sequence_length(sequence_length, loaded)
    readings = [
        read_text(path, size, data, part, tokens, length)
        for path, size in zip(paths, vocabulary, strict=True)
    ]
    subjects = [
        Subject(name, model, trained_steps(Path(path)))
        for name, model, path in zip(_names(paths), loaded, paths, strict=True)
    ]
    notes = [reading.note for reading in readings if reading.note]
    together = len(readings) > 1 and np.array_equal(readings[0].blocks, readings[1].blocks)
    shapes = [(len(found), found[0].num_experts) for found in layers]
    stability = together and shapes[0] == shapes[1]
    if len(models) > 1 and not stability:
        why = f"(layers, experts) are {shapes[0]} and {shapes[1]}" if together else "the tokenizers differ"
        notes.append(f"no routing stability between the two models: {why}")
    if together:
        analyses = analyze_models(
            subjects, readings[0].blocks, readings[0].token_text, options, stability=stability
        )
    else:
        analyses = _one_by_one(subjects, readings, options)
    return Analysis(text=readings[0].text, models=analyses, notes=notes)


def _one_by_one(
    subjects: Sequence[Subject], readings: Sequence[Reading], options: AnalysisOptions
) -> list[ModelAnalysis]:
    """Each model with its own reading; only the first has tokens to explore, which must be the same for all."""
    analyses = []
    for index, (subject, reading) in enumerate(zip(subjects, readings, strict=True)):
        explored = options.explored_tokens if index == 0 else 0
        own = replace(options, explored_tokens=explored)
        analyses += analyze_models([subject], reading.blocks, reading.token_text, own)
    return analyses


def model_path(model: str) -> str:
    """The model folder that is meant: a run folder stands for the `model/` in it."""
    inside = Path(model) / "model"
    return str(inside) if (inside / "config.json").is_file() else model


def trained_steps(folder: Path) -> int:
    """Optimizer steps a model was trained for, by its folder's name or its run's result; 0 if neither says."""
    if found := re.fullmatch(r"checkpoint-(\d+)", folder.name):
        return int(found[1])
    try:
        return int(json.loads((folder.parent / "result.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _names(paths: Sequence[str]) -> list[str]:
    """A short name for each: its folder's, or its run's; the whole path where that would not tell them apart."""
    resolved = [Path(path).resolve() for path in paths]
    short = [
        real.parent.name if real.name == "model" else display_name(Path(path))
        for path, real in zip(paths, resolved, strict=True)
    ]
    if len(set(short)) == len(short):
        return short
    whole = [str(path) for path in paths]
    return (
        whole if len(set(whole)) == len(whole) else [f"{path} ({i})" for i, path in enumerate(whole, start=1)]
    )


def _sequence_length(asked: int | None, models: Sequence[torch.nn.Module]) -> int:
    configs = [model.config.get_text_config() for model in models]  # type: ignore[union-attr, operator]
    limit = min(getattr(config, "max_position_embeddings", None) or SEQUENCE_LENGTH for config in configs)
    if asked is None:
        return min(SEQUENCE_LENGTH, limit)
    if not 2 <= asked <= limit:
        raise RequestError("--sequence-length", asked, f"2 to {limit}")
    return asked


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            "--device", name, f"a device that torch finds here ({str(error).splitlines()[0]})"
        ) from None
    return device
