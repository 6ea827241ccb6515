"""From model folders to one `Analysis`: load, read with each model's tokenizer, measure together what can be."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import rmoe
from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import OF_CHOICES, WHOLE_MODEL, AnalysisOptions, TextOptions, require_measures
from rmoe.analysis.reading import choose_tokenizer, read_text
from rmoe.analysis.streaming.memory import free_memory
from rmoe.analysis.streaming.run import Hidden, Progress, StreamedRouting, stream_routing
from rmoe.analysis.streaming.weights import StreamedModel, loaded_bytes
from rmoe.analysis.token_text import TokenText
from rmoe.analysis.tracing import analyze_trace, layers_and_vocabulary, record_trace, require_fit
from rmoe.data.encode import ByteEncoder, load_encoder
from rmoe.errors import RequestError
from rmoe.moe import RoutedLayer, require_layers
from rmoe.places import display_name, expand, model_folder
from rmoe.results.analysis import Analysis, TextInfo
from rmoe.results.engine_traces import Given, read_any_trace
from rmoe.results.trace import Trace

SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Streaming:
    """How a model that is larger than memory is read.

    Attributes:
        folder: for hidden states and routing, removed at the end.
        asked: stream whatever the size; else only a model larger than the free memory.
        hidden: see `stream_routing`.
        report: called after each layer.
    """

    folder: Path
    asked: bool = False
    hidden: Hidden = "auto"
    report: Callable[[Progress], object] = lambda progress: None

    def applies(self, models: Sequence[tuple[Path, str]], device: torch.device) -> list[bool]:
        """Which of the models that are to be in memory together, each with its dtype, are to be streamed."""
        if self.asked:
            return [True] * len(models)
        found, left = list[bool](), free_memory(device)
        for path, dtype in models:
            needed = loaded_bytes(path, dtype, left)
            found.append(needed > left)
            left -= 0 if found[-1] else needed
        return found


def analyze_folders(
    models: Sequence[str],
    text: TextOptions,
    device: str | None,
    options: AnalysisOptions,
    streaming: Streaming,
    dtype: str,
) -> Analysis:
    """Analyse one model, or two side by side.

    Two that read the same ids go through the text together, and with the same layers and experts their routing
    is compared token by token (saturation). Where that cannot be, a note says so and the rest is reported.

    Args:
        models: one or two, see `rmoe.places.model_folder`.
        text: see `reading.read_text`.
        device: as torch names it; None is a GPU if there is one.
        options: sizes of the samples.
        streaming: where layer by layer keeps its files, and whether it is asked for.
        dtype: that the last model is loaded in; "auto" is that of its files. Two of one model, the second in another
            dtype, show how often its choice flips.

    Raises:
        RequestError: whatever is wrong with the models, the text or the options.
    """
    paths = [model_folder(model) for model in models]
    names = _names(paths)
    target = device_of(device)
    dtypes = [*["auto"] * (len(paths) - 1), dtype]
    in_parts = streaming.applies([*zip(paths, dtypes, strict=True)], target)
    streamed = [
        StreamedModel(path, target, each) if part else None
        for path, part, each in zip(paths, in_parts, dtypes, strict=True)
    ]
    loaded = [
        rmoe.load(path, device=target, dtype=each) if part is None else part.model
        for path, part, each in zip(paths, streamed, dtypes, strict=True)
    ]
    needs_loss = {"gradients", "balance"} & {*options.measures} if options.gradient_tokens else set()
    needs_loss |= {"regret"} & {*options.measures}
    for path, model in zip(paths, loaded, strict=True):
        if needs_loss and not model.can_generate():
            without = ", ".join(sorted(needs_loss))
            allowed = f"a language model, not {type(model).__name__}, or --measures without {without}"
            raise RequestError("MODEL", str(path), allowed)
    layers = [require_layers(model) for model in loaded]  # before anything slow
    length = _sequence_length(text.sequence_length, loaded)
    readings = [read_text(path, model, text, length) for path, model in zip(paths, loaded, strict=True)]
    notes = [reading.note for reading in readings if reading.note]
    routings: list[StreamedRouting | None] = []
    for i, (layered, reading) in enumerate(zip(streamed, readings, strict=True)):
        if layered is None:
            routings.append(None)
            continue
        folder, size = streaming.folder / str(i), options.batch_size
        how = streaming.hidden, streaming.report
        routings.append(stream_routing(layered, reading.blocks, size, folder, *how))
        needs: list[str] = [n for n in WHOLE_MODEL if n in options.measures]
        needs += ["the check of the reading"] if options.check else []
        skipped = f": {', '.join(needs)} skipped, which need all layers at once" if needs else ""
        notes.append(f"{names[i]} was read layer by layer{skipped}")
    subjects = [
        Subject(name, model, trained_steps(path), routing, str(run_folder(path)))
        for name, model, path, routing in zip(names, loaded, paths, routings, strict=True)
    ]
    together = len(readings) > 1 and np.array_equal(readings[0].blocks, readings[1].blocks)
    shapes = [(len(found), found[0].num_experts) for found in layers]
    stability = together and shapes[0] == shapes[1]
    if len(models) > 1 and not stability:
        why = f"(layers, experts) are {shapes[0]} and {shapes[1]}" if together else "the tokenizers differ"
        notes.append(f"no routing stability between the two models: {why}")
    if together:
        analyses = analyze_models(
            subjects, readings[0].blocks, readings[0].token_text, options, stability=stability, notes=notes
        )
    else:
        analyses = []
        for subject, reading in zip(subjects, readings, strict=True):
            analyses += analyze_models([subject], reading.blocks, reading.token_text, options, notes=notes)
            # Tokens to explore are the same for all, or the first's.
            options = replace(options, explored_tokens=0)
    for routing in routings:
        if routing is not None:
            routing.close()
    return Analysis(text=readings[0].text, models=analyses, notes=notes)


def analyze_trace_file(
    path: str, model: str | None, given: Given, measures: Collection[str] = OF_CHOICES
) -> Analysis:
    """Analyse a trace of this package or of another program.

    Args:
        path: see `rmoe.results.engine_traces.read_any_trace`.
        model: whose routing it is: its layers, k and vocabulary must fit, and its tokenizer shows the tokens.
        given: what the trace does not say itself.
        measures: of `OF_CHOICES`.

    Raises:
        RequestError: an unknown format, a trace that does not fit, a measure that needs more than choices.
    """
    require_measures(measures, OF_CHOICES)
    place = expand(path, "--trace")
    token_text: Callable[[int], str] = "#{}".format
    layers: list[RoutedLayer] = []
    if model is None:
        found, notes = read_any_trace(place, given)
        name = (found.meta.model if isinstance(found, Trace) else "") or place.name
        if isinstance(found, Trace) and found.tokens is not None:
            notes.append("tokens are shown by their ids: name the MODEL beside --trace to see their text")
    else:
        folder = model_folder(model)
        layers, vocabulary = layers_and_vocabulary(folder)
        complete = place.suffix == ".safetensors"  # this package's own says both itself
        found, notes = read_any_trace(place, given if complete else _of_model(given, layers, folder))
        require_fit(found, layers, vocabulary)
        name = display_name(folder)
        tokenizer, note = choose_tokenizer(str(folder), vocabulary)
        notes += [note] if note else []
        token_text = TokenText((ByteEncoder() if tokenizer == "bytes" else load_encoder(tokenizer)).tokenizer)
    analysis, more = analyze_trace(found, name, token_text, measures, [layer.top_k for layer in layers])
    tokens = len(found.experts) if isinstance(found, Trace) else analysis.frequency_n
    digest = hashlib.sha256()
    for file in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        digest.update(file.read_bytes())
    text = TextInfo(name=place.name, sha256=digest.hexdigest(), tokens=tokens)
    return Analysis(text=text, models=[analysis], notes=notes + more)


def _of_model(given: Given, layers: Sequence[RoutedLayer], folder: Path) -> Given:
    """E and k by the model, where the user gave neither; both must be the same in all its layers."""
    experts, slots = {layer.num_experts for layer in layers}, {layer.slots for layer in layers}
    return replace(
        given,
        num_experts=given.num_experts or (max(experts) if len(experts) == 1 else None),
        experts_per_token=given.experts_per_token or (max(slots) if len(slots) == 1 else None),
        model=display_name(folder),
    )


def trace_folder(model: str, text: TextOptions, batch_size: int, device: str | None) -> Trace:
    """Record the routing of one model on a text. Arguments as of `analyze_folders`.

    Raises:
        RequestError: whatever is wrong with the model or the text.
    """
    path = model_folder(model)
    loaded = rmoe.load(path, device=device_of(device))
    require_layers(loaded)
    reading = read_text(path, loaded, text, _sequence_length(text.sequence_length, [loaded]))
    return record_trace(loaded, reading.blocks, _names([path])[0], batch_size)


def trained_steps(folder: Path) -> int:
    """Optimizer steps a model was trained for, by its folder's name or its run's result; 0 if neither says."""
    if found := re.fullmatch(r"checkpoint-(\d+)", folder.name):
        return int(found[1])
    try:
        return int(json.loads((folder.parent / "result.json").read_bytes())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def run_folder(folder: Path) -> Path:
    """The folder of a model's run: `run` of `run/model`, `run/checkpoint-500` and `run/checkpoints/checkpoint-500`."""
    parent = folder.resolve().parent
    return parent.parent if parent.name == "checkpoints" else parent


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each: its folder's, or its run's; the whole path where that would not tell them apart."""
    short = [display_name(path) for path in paths]
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


def device_of(name: str | None) -> torch.device:
    """The device of this name; None is a GPU if there is one.

    Raises:
        RequestError: torch does not find it here.
    """
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
