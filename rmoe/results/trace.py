"""`trace.safetensors`: which experts every token of a text was sent to, layer by layer.

Written by `rmoe trace`; traces of serving engines and of Megatron are read by `rmoe.results.engine_traces`. `N` tokens,
`L` layers with a router, `K` slots per token (the largest k of all layers).

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rmoe.errors import RequestError
from rmoe.records import NOT_JSON, Record, atomic_write, version_of

TRACE_VERSION = 1
TRACE_FORMAT = "rmoe.trace"
NO_EXPERT = -1
"""Marks a slot without an expert: skipped, dropped, or of a layer that uses fewer slots than others."""

MAX_EXPERTS = int(np.iinfo(np.int16).max)


class TraceMeta(Record, frozen=True, kw_only=True):
    """What a trace says about itself.

    `ranked`: slot 0 holds the expert of largest weight, slot 1 the next, and so on. Engines that only promise a set
    leave it false, and measures that need a first choice are then skipped.
    """

    schema_version: int = TRACE_VERSION
    model: str  # what routed: a folder's or a repository's name, "" where it is not known
    source: str  # what recorded: "rmoe", "vllm", "megatron", "llama.cpp"
    layer_names: list[str]  # [L]
    num_experts: list[int]  # [L]
    experts_per_token: list[int]  # [L]
    vocab_size: int | None = None
    ranked: bool = False


@dataclass(frozen=True, eq=False)
class Trace:
    """The routing of N consecutive tokens of one or several sequences.

    Attributes:
        experts: [N, L, K] int16, `NO_EXPERT` in a slot without an expert.
        tokens: [N] int32 token ids; None where the source does not say them.
        sequences: [S] int64, how many tokens each sequence has; their sum is N.
        meta: see `TraceMeta`.

    Raises:
        RequestError: the parts do not fit each other.
    """

    experts: np.ndarray
    tokens: np.ndarray | None
    sequences: np.ndarray
    meta: TraceMeta

    def __post_init__(self) -> None:
        _require(self.experts.dtype == np.int16 and self.experts.ndim == 3, "experts", "[N, L, K] int16")
        count, layers, slots = self.experts.shape
        meta = self.meta
        for name in ("layer_names", "num_experts", "experts_per_token"):
            _require(len(getattr(meta, name)) == layers, name, f"one entry per layer ({layers})")
        _require(count > 0 and layers > 0, "experts", "at least one token and one layer")
        _require(
            slots == max(meta.experts_per_token), "experts", f"{max(meta.experts_per_token)} slots per token"
        )
        _require(
            min(meta.num_experts) > 0 and max(meta.num_experts) <= MAX_EXPERTS, "num_experts", "1 to 32767"
        )
        limit = np.array(meta.num_experts)[:, None]
        _require(
            bool(((self.experts >= NO_EXPERT) & (self.experts < limit)).all()),
            "experts",
            f"ids from 0 below each layer's num_experts ({_spans(meta.num_experts)}), or -1 in an empty slot",
        )
        used = np.arange(slots) < np.array(meta.experts_per_token)[:, None]
        _require(not (self.experts[:, ~used] != NO_EXPERT).any(), "experts", "-1 in slots beyond a layer's k")
        ordered = np.sort(self.experts, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NO_EXPERT)
        _require(not twice.any(), "experts", "k different experts per token and layer")
        _require(
            self.sequences.ndim == 1
            and int(self.sequences.sum()) == count
            and bool((self.sequences > 0).all()),
            "sequences",
            f"lengths that sum to the {count} tokens",
        )
        if self.tokens is not None:
            _require(self.tokens.shape == (count,), "tokens", f"one id for each of {count} tokens")
            highest = np.iinfo(np.int32).max if meta.vocab_size is None else meta.vocab_size
            fits = bool((self.tokens >= 0).all() and (self.tokens < highest).all())
            _require(fits, "tokens", f"ids from 0 below vocab_size ({meta.vocab_size})")


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace, whole or not at all."""
    tensors = {"experts": trace.experts, "sequences": trace.sequences.astype(np.int64)}
    if trace.tokens is not None:
        tensors["tokens"] = trace.tokens.astype(np.int32)
    about = {"format": TRACE_FORMAT, "meta": msgspec.json.encode(trace.meta).decode()}
    with atomic_write(path, alone=False) as staged:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()}, staged, metadata=about
        )


def read_trace(path: Path) -> Trace:
    """Read a trace that `write_trace` wrote.

    Raises:
        RequestError: it is absent, cut, of another version, not a trace, or its parts do not fit.
    """
    allowed = "a trace written by `rmoe trace`"
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != TRACE_FORMAT:
                raise RequestError(f"{path}: format", about.get("format"), allowed)
            version_of(about.get("meta", "").encode(), str(path), TRACE_VERSION, TRACE_VERSION)
            meta = msgspec.json.decode(about["meta"], type=TraceMeta)
            names = set(file.keys())
            if not {"experts", "sequences"} <= names <= {"experts", "sequences", "tokens"}:
                raise RequestError(f"{path}: tensors", sorted(names), "experts, sequences and tokens")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, *NOT_JSON) as error:
        raise RequestError(str(path), str(error), allowed) from error
    return Trace(tensors["experts"], tensors.get("tokens"), tensors["sequences"], meta)


def _require(holds: bool, name: str, allowed: str) -> None:
    if not holds:
        raise RequestError("trace", f"one whose {name} do not fit", allowed)


def _spans(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
