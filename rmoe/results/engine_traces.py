"""Routing traces of other programs, as they write them: vLLM, SGLang, Megatron-LM, llama.cpp.

vLLM 0.22 (PR 28284, 38939, 51906)
    JSON of its OpenAI server: `choices[i].routed_experts`, base64 of a NumPy file `[tokens, layers, k]`. Does not say
    E, nor which layers are dense: those are zero everywhere.
SGLang 0.4.5 (PR 4435)
    CSV `layer_id,expert_id,count`, summed over tokens: no tokens, no k, no E.
Megatron-LM (PR 5220, `--moe-routing-trace-path`, seen in July 2026)
    `router_trace_rank*.jsonl`, a line per rank, step and layer: no token ids, no E.
llama.cpp (PR 28544, not merged in November 2026)
    CSV without a header, `layer,expert` per assignment: no token ids, no k, no E.

What a file does not say has to be given; nothing is guessed. Imports no torch.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rmoe.errors import RequestError
from rmoe.records import atomic_write
from rmoe.results.trace import MAX_EXPERTS, NO_EXPERT, Trace, TraceMeta, read_trace
from rmoe.validation import require

FORMATS = (
    "rmoe (.safetensors), vLLM (.json, .jsonl, .npy), SGLang (.csv), "
    "Megatron-LM (.jsonl or its folder), llama.cpp (.csv)"
)
_SGLANG_HEADER = "layer_id,expert_id,count"
_MEGATRON_FILES = "router_trace_rank*.jsonl"


@dataclass(frozen=True, eq=False)
class ExpertCounts:
    """Assignments per expert, all that a trace without tokens holds.

    Attributes:
        counts: [L, E] int64.
        layer_names: [L].
        experts_per_token: k; None where it was not given.
        source: which program counted.
    """

    counts: np.ndarray
    layer_names: list[str]
    experts_per_token: int | None
    source: str


@dataclass(frozen=True)
class Given:
    """What the user says about a trace that does not say it itself.

    Attributes:
        num_experts: E. experts_per_token: k. model: a name to show.
    """

    num_experts: int | None = None
    experts_per_token: int | None = None
    model: str = ""

    def experts(self, highest: int, source: str) -> int:
        """E, which must be above the highest id seen."""
        if self.num_experts is None or not highest < self.num_experts <= MAX_EXPERTS:
            allowed = (
                f"experts per layer, which a {source} trace does not say: more than {highest}, its largest id"
            )
            raise RequestError("--experts", self.num_experts, allowed)
        return self.num_experts


def read_any_trace(path: Path, given: Given) -> tuple[Trace | ExpertCounts, list[str]]:
    """Read a trace of any known format, which its content decides.

    Args:
        path: a file; for Megatron-LM also the folder with one file per rank.
        given: E and k where the format does not say them; must agree where it does.

    Returns:
        The trace, and notes about what was skipped.

    Raises:
        RequestError: no such file, an unknown format, or content that does not fit.
    """
    try:
        found, notes = _read(path, given)
    except RequestError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RequestError("--trace", str(path), f"a file in a known format: {FORMATS} ({error})") from error
    if isinstance(found, Trace):
        for option, asked, has in (
            ("--experts", given.num_experts, set(found.meta.num_experts)),
            ("--experts-per-token", given.experts_per_token, set(found.meta.experts_per_token)),
        ):
            if asked is not None and has != {asked}:
                raise RequestError(option, asked, f"what the trace says: {', '.join(map(str, sorted(has)))}")
    return found, notes


def _read(path: Path, given: Given) -> tuple[Trace | ExpertCounts, list[str]]:
    if path.is_dir():
        return read_megatron(sorted(path.glob(_MEGATRON_FILES)), given, str(path))
    with path.open("rb") as file:
        start = file.read(256)
    if path.suffix == ".safetensors":
        return read_trace(path), []
    if start.startswith(b"\x93NUMPY"):
        return read_vllm([_Response(_load_npy(path.read_bytes(), path), None)], path, given)
    first = next(iter(start.decode("utf-8-sig", errors="replace").splitlines()), "").strip()
    if first == _SGLANG_HEADER:
        return read_sglang(path, given), []
    if re.fullmatch(r"\d+,\d+", first):
        return read_llama_cpp(path, given), []
    if first.startswith("{") and '"top_indices"' in _first_line(path):
        return read_megatron([path], given, str(path))
    if first.startswith(("{", "[")):
        return read_vllm(list(_responses(path)), path, given)
    raise RequestError("--trace", str(path), f"a file in a known format: {FORMATS}")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.readline()


# --- vLLM ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Response:
    experts: np.ndarray  # [tokens, all layers, k]
    tokens: list[int] | None


def _responses(path: Path) -> Iterable[_Response]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
        documents = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        documents = [json.loads(line) for line in text.split("\n") if line.strip()]
    for document in documents:
        choices = document.get("choices") if isinstance(document, dict) else None
        if not isinstance(choices, list):
            raise RequestError("--trace", str(path), f"a file in a known format: {FORMATS}")
        for number, choice in enumerate(choices):
            found = _response(document, choice, path)
            if number:
                found = _without_prompt(found, document, choice, path)
            if len(found.experts):  # an answer of one token has no routing of its own
                yield found


def _response(document: dict[str, Any], choice: dict[str, Any], path: Path) -> _Response:
    """One answer. Up to vLLM 0.21 the prompt's part stands beside `choices`, later both are in one array."""
    parts = [document.get("prompt_routed_experts"), choice.get("routed_experts")]
    arrays = [_decode(part, path) for part in parts if part is not None]
    asked = "responses with routed_experts (vllm serve --enable-return-routed-experts)"
    require(bool(arrays), "--trace", str(path), asked)
    alike = len({array.shape[1:] for array in arrays}) == 1
    require(alike, "--trace", str(path), "the same layers and k in prompt and completion")
    experts = np.concatenate(arrays)
    prompt, made = document.get("prompt_token_ids") or choice.get("prompt_token_ids"), choice.get("token_ids")
    if prompt is None or made is None:
        return _Response(experts, None)
    ids = [*prompt, *made]
    whole = all(type(token) is int and 0 <= token < 2**31 for token in ids)
    require(whole, "--trace", str(path), "token ids that are whole numbers from 0 below 2^31")
    # The last token that was generated is never fed back, so it has no routing.
    asked = f"routing for {len(ids) - 1} tokens (prompt and completion less its last), not {len(experts)}"
    require(len(experts) in (len(ids), len(ids) - 1), "--trace", str(path), asked)
    return _Response(experts, ids[: len(experts)])


def _without_prompt(
    found: _Response, document: dict[str, Any], choice: dict[str, Any], path: Path
) -> _Response:
    """Another answer to the same prompt (`n`): its own tokens alone, as the prompt was read once."""
    given = document.get("prompt_routed_experts")
    prompt = document.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if given is None and prompt is None:
        raise RequestError("--trace", str(path), "prompt_token_ids in a response with several choices")
    length = len(_decode(given, path)) if prompt is None else len(prompt)
    return _Response(found.experts[length:], None if found.tokens is None else found.tokens[length:])


def _decode(part: Any, path: Path) -> np.ndarray:
    return _load_npy(base64.b64decode(part, validate=True), path)


def _load_npy(data: bytes, path: Path) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:  # a header may claim any size
        raise RequestError("--trace", str(path), f"a whole NumPy file ({error})") from error
    fits = array.ndim == 3 and np.issubdtype(array.dtype, np.integer) and array.size > 0
    asked = f"integers [tokens, layers, k], not {array.dtype} {list(array.shape)}"
    require(fits, "--trace", str(path), asked)
    return array


def read_vllm(answers: Sequence[_Response], path: Path, given: Given) -> tuple[Trace, list[str]]:
    """vLLM's returned routed experts: JSON or JSON lines of its OpenAI server, or `routed_experts` saved by NumPy.

    Dense layers, which vLLM fills with zeros, are skipped. Slots are in no promised order.
    """
    require(bool(answers), "--trace", str(path), "at least one response with routed_experts")
    shapes = sorted({answer.experts.shape[1:] for answer in answers})
    require(len(shapes) == 1, "--trace", str(path), f"the same layers and k in every response, not {shapes}")
    experts = np.concatenate([answer.experts for answer in answers])
    routed = (experts != 0).any(axis=(0, 2))
    require(bool(routed.any()), "--trace", str(path), "routing that is not zero everywhere")
    notes = []
    if not routed.all():
        notes.append(f"layers {np.flatnonzero(~routed).tolist()} are zero everywhere: read as dense layers")
    kept = experts[:, routed]
    known = [answer.tokens for answer in answers if answer.tokens is not None]
    tokens = np.array([*chain(*known)], np.int32) if len(known) == len(answers) else None
    trace = _trace(
        kept,
        tokens,
        [len(answer.experts) for answer in answers],
        [f"layers.{index}" for index in np.flatnonzero(routed)],
        given.experts(int(kept.max()), "vLLM"),
        given.model,
        "vllm",
    )
    return trace, notes


def write_vllm(path: Path, trace: Trace) -> None:
    """Write a trace as JSON lines of vLLM's completion responses, one per sequence, all of it as the prompt's.

    Args:
        path: where to.
        trace: its layers must be called `...layers.<index>...` or be numbered from 0. Dense ones between them are
            filled with zeros, as vLLM does.

    Raises:
        RequestError: slots without an expert, for which vLLM has no sign.
    """
    full = bool((trace.experts != NO_EXPERT).all())
    asked = "a trace in which every slot has an expert: vLLM's form has no empty slot"
    require(full, "--out", str(path), asked)
    indices = [_index(name, position) for position, name in enumerate(trace.meta.layer_names)]
    total = max(indices) + 1
    require(
        len(set(indices)) == len(indices),
        "--out",
        str(path),
        f"one routed layer for each of {total} layers, not {indices}",
    )
    whole = np.zeros((len(trace.experts), total, trace.experts.shape[2]), np.int32)
    whole[:, indices] = trace.experts
    ends = np.cumsum(trace.sequences)
    with atomic_write(path, alone=False) as staged, staged.open("w", encoding="utf-8") as file:
        for number, (start, end) in enumerate(zip(ends - trace.sequences, ends, strict=True)):
            buffer = io.BytesIO()
            np.save(buffer, whole[start:end])
            ids = None if trace.tokens is None else trace.tokens[start:end].tolist()
            choice = {
                "index": 0,
                "text": "",
                "finish_reason": "length",
                "token_ids": [],
                "routed_experts": base64.b64encode(buffer.getvalue()).decode(),
            }
            answer = {
                "id": f"cmpl-{number}",
                "object": "text_completion",
                "model": trace.meta.model,
                "prompt_token_ids": ids,
                "choices": [choice],
            }
            file.write(json.dumps(answer) + "\n")


def _index(name: str, position: int) -> int:
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else position


# --- SGLang, Megatron-LM, llama.cpp -------------------------------------------------------------------------------


def read_sglang(path: Path, given: Given) -> ExpertCounts:
    """SGLang's `expert_distribution_*.csv`: `layer_id,expert_id,count`, from `/dump_expert_distribution_record`."""
    counts: dict[tuple[int, int], int] = {}
    for layer, expert, count in _rows(path, 3, skip=1):
        asked = f"one row for layer {layer}, expert {expert}"
        require((layer, expert) not in counts, "--trace", str(path), asked)
        counts[layer, expert] = count
    require(any(counts.values()), "--trace", str(path), "at least one token")
    layers = sorted({layer for layer, _ in counts})
    table = np.zeros((len(layers), given.experts(max(expert for _, expert in counts), "SGLang")), np.int64)
    for (layer, expert), count in counts.items():
        table[layers.index(layer), expert] = count
    return ExpertCounts(table, [f"layers.{layer}" for layer in layers], given.experts_per_token, "sglang")


def read_llama_cpp(path: Path, given: Given) -> Trace:
    """llama.cpp's `moe_trace.csv`: `layer,expert` per assignment, in each batch one layer after the other."""
    slots = given.experts_per_token
    if slots is None or slots < 1:
        raise RequestError("--experts-per-token", slots, "k, which a llama.cpp trace does not say")
    per_layer: dict[int, list[int]] = defaultdict(list)
    blocks: list[tuple[int, list[int]]] = []
    for layer, expert in _rows(path, 2):
        per_layer[layer].append(expert)
        if not blocks or blocks[-1][0] != layer:
            blocks.append((layer, []))
        blocks[-1][1].append(expert)
    layers = sorted(per_layer)
    sizes = {len(per_layer[layer]) for layer in layers}
    even = len(sizes) == 1 and sizes.pop() % slots == 0
    asked = f"the same whole number of tokens, of {slots} rows, in every layer"
    require(even, "--trace", str(path), asked)
    num_experts = given.experts(max(max(ids) for ids in per_layer.values()), "llama.cpp")
    # The pull request reads the strided view of an argsort as if it were contiguous: what it writes for a batch of
    # several tokens is then the first token's whole ranking, and not what the others chose.
    for layer, ids in blocks if len(layers) > 1 and num_experts > slots else ():
        asked = f"one token per batch (-ub 1): layer {layer} lists all {num_experts} experts, a whole ranking"
        require(len(set(ids[:num_experts])) < num_experts, "--trace", str(path), asked)
    experts = np.stack([np.array(per_layer[layer]).reshape(-1, slots) for layer in layers], axis=1)
    names = [f"layers.{layer}" for layer in layers]
    return _trace(experts, None, [len(experts)], names, num_experts, given.model, "llama.cpp")


def read_megatron(paths: Sequence[Path], given: Given, shown: str) -> tuple[Trace, list[str]]:
    """Megatron-LM's router traces, of one rank or of all: a JSON line per rank, step and layer.

    Only the decoder's layers are read, not those of multi-token prediction. Steps that do not have all layers, such as
    one cut by the end of the capture, are skipped and counted.
    """
    require(bool(paths), "--trace", shown, f"a folder with {_MEGATRON_FILES}")
    steps: dict[tuple[int, int, int], dict[int, list[list[int]]]] = defaultdict(dict)
    for path in paths:
        seen: dict[tuple[int, int, int], int] = defaultdict(int)
        with path.open(encoding="utf-8-sig") as file:
            for line in filter(str.strip, file):
                rank, step, layer, rows = _megatron_line(line, path)
                if rows is None:
                    continue
                micro = seen[rank, step, layer]  # in training a layer runs once per microbatch
                seen[rank, step, layer] += 1
                steps[rank, step, micro][layer] = rows
    layers = sorted({layer for step in steps.values() for layer in step})
    whole = [
        step
        for _, step in sorted(steps.items())
        if len(step) == len(layers) and len({len(r) for r in step.values()}) == 1
    ]
    asked = f"a step with all {len(layers)} layers; is it one pipeline stage of several?"
    require(bool(whole), "--trace", shown, asked)
    slots = {len(row) for step in whole for rows in step.values() for row in rows}
    require(len(slots) == 1, "--trace", shown, f"the same k for every token, not {sorted(slots)}")
    experts = np.concatenate(
        [np.stack([np.array(step[layer]) for layer in layers], axis=1) for step in whole]
    )
    notes = [f"{len(steps) - len(whole)} steps without all layers skipped"] if len(whole) < len(steps) else []
    lengths = [len(step[layers[0]]) for step in whole]
    names = [f"decoder.layers.{layer}" for layer in layers]
    num_experts = given.experts(int(experts.max()), "Megatron-LM")
    return _trace(experts, None, lengths, names, num_experts, given.model, "megatron"), notes


def _megatron_line(line: str, path: Path) -> tuple[int, int, int, list[list[int]] | None]:
    try:
        record = json.loads(line)
        if record.get("block", "decoder") != "decoder":
            return 0, 0, 0, None
        rows = record["top_indices"]
        if len(rows) != record["num_tokens"] or any(len(row) != record["topk"] for row in rows):
            raise ValueError("num_tokens and topk do not fit top_indices")
        if record["topk"] < 1 or not all(type(expert) is int for row in rows for expert in row):
            raise ValueError("top_indices are not whole numbers, one or more for each token")
        return int(record["rank"]), int(record["step"]), int(record["layer"]), rows
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        allowed = f"lines with rank, step, layer, num_tokens, topk, top_indices ({error})"
        raise RequestError("--trace", str(path), allowed) from error


def _rows(path: Path, columns: int, skip: int = 0) -> Iterable[tuple[int, ...]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            if number < skip or not line.strip():
                continue
            cells = line.strip().split(",")
            numbers = len(cells) == columns and all(cell.isascii() and cell.isdigit() for cell in cells)
            where = f"{path}, line {number + 1}: {line.strip()[:40]}"
            require(numbers, "--trace", where, f"{columns} whole numbers")
            yield tuple(map(int, cells))


def _trace(
    experts: np.ndarray,
    tokens: np.ndarray | None,
    lengths: Sequence[int],
    names: list[str],
    num_experts: int,
    model: str,
    source: str,
) -> Trace:
    least = int(experts.min())
    require(least >= NO_EXPERT, "trace", f"one with expert {least}", "ids from 0, or -1 in an empty slot")
    meta = TraceMeta(
        model=model,
        source=source,
        layer_names=names,
        num_experts=[num_experts] * len(names),
        experts_per_token=[experts.shape[2]] * len(names),
    )
    return Trace(experts.astype(np.int16), tokens, np.array(lengths, np.int64), meta)
