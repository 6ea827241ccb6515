"""Traces: a model's routing written down, and the measures that need nothing but who was chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from rmoe.analysis.measures import ChoiceMeasures, Sizes, load_fields
from rmoe.analysis.options import OF_CHOICES
from rmoe.errors import RequestError
from rmoe.model.loading import empty_model
from rmoe.moe import Recorder, RoutedLayer, RoutingRecord, require_layers
from rmoe.moe.reading import is_own
from rmoe.results import analysis as schema
from rmoe.results.engine_traces import ExpertCounts
from rmoe.results.trace import MAX_EXPERTS, NO_EXPERT, Trace, TraceMeta

_TOKENS_AT_ONCE = 8192


def record_trace(model: nn.Module, blocks: np.ndarray, name: str, batch_size: int = 8) -> Trace:
    """Run a model over a text and keep which experts each token was sent to, largest weight first.

    Args:
        model: any MoE that `rmoe.moe` reads, in evaluation mode.
        blocks: [N, S] token ids; each block is a sequence of its own.
        name: of the model, for the file.
        batch_size: blocks per forward pass.

    Raises:
        RequestError: no MoE layers, or more experts than int16 can number.
    """
    recorder = Recorder(model)
    if recorder.num_experts > MAX_EXPERTS:
        raise RequestError(
            "MODEL", f"{name} with {recorder.num_experts} experts", f"at most {MAX_EXPERTS} in a trace"
        )
    embedding = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    parts = []
    records: list[RoutingRecord] = []
    for start in range(0, len(blocks), batch_size):
        ids = torch.from_numpy(blocks[start : start + batch_size].astype(np.int64)).to(embedding.device)
        records = recorder(ids)
        parts.append(_ranked(records))
    meta = TraceMeta(
        model=name,
        source="rmoe",
        layer_names=recorder.names,
        num_experts=[record.num_experts for record in records],
        experts_per_token=[record.experts.shape[1] for record in records],
        vocab_size=len(embedding),
        ranked=True,
    )
    sequences = np.full(len(blocks), blocks.shape[1], np.int64)
    return Trace(np.concatenate(parts), blocks.reshape(-1).astype(np.int32), sequences, meta)


def _ranked(records: Sequence[RoutingRecord]) -> np.ndarray:
    """[T, L, K] int16, each token's experts by the layer's score, largest first, empty slots last.

    Layer by layer, where its routing is: all layers' probabilities at once are a hundred times the ids.
    """
    slots = max(record.experts.shape[1] for record in records)
    layers = []
    for record in records:
        empty = record.experts >= record.num_experts
        scores = record.probs.gather(-1, record.experts.clamp(max=record.probs.shape[-1] - 1))
        order = scores.masked_fill(empty, -1).argsort(stable=True, dim=-1, descending=True)
        ids = record.experts.masked_fill(empty, NO_EXPERT).gather(-1, order).to(torch.int16).cpu()
        layers.append(nn.functional.pad(ids, (0, slots - ids.shape[1]), value=NO_EXPERT))
    return torch.stack(layers, dim=1).numpy()


def analyze_trace(
    found: Trace | ExpertCounts,
    name: str,
    token_text: Callable[[int], str] = str,
    measures: Collection[str] = OF_CHOICES,
    top_k: Sequence[int] = (),
) -> tuple[schema.ModelAnalysis, list[str]]:
    """Every measure that needs only who was chosen.

    Args:
        found: what was read.
        name: how the model is called in the report.
        token_text: how a token id is shown.
        measures: of `OF_CHOICES`; a trace of counts has "load" alone.
        top_k: k of each layer, where the model says it; a trace says how many slots a choice has room for.

    Returns:
        The analysis, and notes about what the trace does not allow.
    """
    if isinstance(found, ExpertCounts):
        if "load" not in measures:
            said = ",".join(measures)
            raise RequestError("--measures", said, f"load, all that a {found.source} trace tells")
        return _of_counts(found, name), [
            f"a {found.source} trace is summed over tokens: load alone can be measured from it"
        ]
    meta, notes = found.meta, []
    by_layer = tuple(meta.num_experts), tuple(top_k or meta.experts_per_token)
    num_experts, k = map(max, by_layer)
    sizes = Sizes(len(meta.layer_names), num_experts, k, num_experts, *by_layer)
    used, tokens, counts = np.empty(0, np.int32), None, None
    if found.tokens is not None:
        # Numbered anew, so that memory goes by the ids there are, not by the largest.
        used, tokens, counts = np.unique(found.tokens, return_inverse=True, return_counts=True)
    else:
        notes.append(f"the {meta.source} trace has no token ids: no tokens per expert")
    if not meta.ranked:
        notes.append(
            f"a {meta.source} trace does not rank a token's experts: no paths, no mutual information"
        )
    streamed = ChoiceMeasures(sizes, len(found.experts), counts, meta.ranked, measures)
    for start in range(0, len(found.experts), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        experts = torch.from_numpy(found.experts[part].astype(np.int64)).transpose(0, 1).contiguous()
        experts = experts.masked_fill(experts == NO_EXPERT, num_experts)
        ids = None if tokens is None else torch.from_numpy(tokens[part].astype(np.int64))
        streamed.update(experts, experts[..., 0], ids)
    return (
        schema.ModelAnalysis(
            name=name,
            summary=f"{meta.source} trace, {sizes}",
            layers=sizes.num_layers,
            experts=num_experts,
            experts_per_token=k,
            layer_names=meta.layer_names,
            **streamed.fields(lambda place: token_text(int(used[place]))),
        ),
        notes,
    )


def _of_counts(found: ExpertCounts, name: str) -> schema.ModelAnalysis:
    layers, experts = found.counts.shape
    slots = found.experts_per_token
    if slots is None or slots < 1:
        raise RequestError("--experts-per-token", slots, f"k, which a {found.source} trace does not say")
    tokens = found.counts.sum(axis=-1) / slots
    if (tokens != tokens.astype(int)).any() or len(set(tokens.tolist())) > 1:
        allowed = f"assignments that are {slots} per token, equally many in every layer"
        raise RequestError("--trace", f"{found.counts.sum(axis=-1).tolist()} assignments per layer", allowed)
    n = int(tokens[0])
    return schema.ModelAnalysis(
        name=name,
        summary=f"{found.source} trace, {Sizes(layers, experts, slots, experts)}",
        layers=layers,
        experts=experts,
        experts_per_token=slots,
        layer_names=found.layer_names,
        **load_fields(found.counts, n),
    )


def require_fit(found: Trace | ExpertCounts, layers: Sequence[RoutedLayer], vocabulary: int) -> None:
    """Check that a trace can be of a model with these layers and so many token ids.

    Raises:
        RequestError: other layers, experts, k, or token ids beyond the vocabulary.
    """
    if isinstance(found, ExpertCounts):
        traced = [(found.counts.shape[1], found.experts_per_token)] * len(found.layer_names)
    else:
        traced = list(zip(found.meta.num_experts, found.meta.experts_per_token, strict=True))
    if len(traced) != len(layers):
        raise RequestError("--trace", f"a trace of {len(traced)} MoE layers", f"the model's {len(layers)}")
    for index, ((experts, slots), layer) in enumerate(zip(traced, layers, strict=True)):
        # A gate of ours that asks as many experts as it likes has a slot for each.
        fits = {layer.slots} | ({layer.num_experts} if is_own(layer.gate) else set())
        if experts != layer.num_experts or slots not in fits:
            said = f"a trace with (experts, k) {experts, slots} in layer {index}"
            raise RequestError("--trace", said, f"the model's {layer.num_experts, layer.slots}")
    if isinstance(found, Trace) and found.tokens is not None and int(found.tokens.max()) >= vocabulary:
        said = f"a trace with token id {int(found.tokens.max())}"
        raise RequestError("--trace", said, f"ids below the model's vocabulary size ({vocabulary})")


def layers_and_vocabulary(folder: Path) -> tuple[list[RoutedLayer], int]:
    """The MoE layers of a model folder, whose weights are not read, and how many token ids it has.

    Raises:
        RequestError: not a model folder, or a model without MoE layers.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return require_layers(empty_model(config)), config.get_text_config().vocab_size
    except RequestError:
        raise
    except Exception as error:  # what a damaged configuration makes transformers raise is anyone's guess
        raise RequestError("MODEL", str(folder), f"a model folder ({error})") from error
