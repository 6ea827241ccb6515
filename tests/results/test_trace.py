"""Traces: ours round-trips and refuses what does not fit; those of four other programs are read as they are written."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from rmoe.errors import RequestError
from rmoe.results.engine_traces import ExpertCounts, Given, read_any_trace, write_vllm
from rmoe.results.trace import NO_EXPERT, Trace, TraceMeta, read_trace, write_trace

N, L, E, K = 7, 3, 5, 2


def ids(tokens: int = N, layers: int = L, experts: int = E, k: int = K) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(experts)[:k] for _ in range(tokens * layers)]
    return np.array(drawn, np.int16).reshape(tokens, layers, k)


def meta(**changes: Any) -> TraceMeta:
    names = [f"model.layers.{i}.mlp" for i in range(L)]
    given = TraceMeta(
        model="m",
        source="rmoe",
        layer_names=names,
        num_experts=[E] * L,
        experts_per_token=[K] * L,
        vocab_size=50,
    )
    return msgspec.structs.replace(given, **changes)


def trace(**changes: Any) -> Trace:
    parts = {
        "experts": ids(),
        "tokens": np.arange(N, dtype=np.int32),
        "sequences": np.array([3, 4]),
        "meta": meta(),
    }
    return Trace(**(parts | changes))


def encoded(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_ours_round_trips(tmp_path: Path) -> None:
    experts = ids()
    experts[:, 1, 1] = NO_EXPERT  # a layer of k = 1 beside two of k = 2, with fewer experts
    experts[:, 1, 0] %= 3
    sizes = meta(num_experts=[E, 3, E], experts_per_token=[K, 1, K], ranked=True)
    wrote = trace(experts=experts, meta=sizes)
    write_trace(tmp_path / "t.safetensors", wrote)
    for read in (
        read_trace(tmp_path / "t.safetensors"),
        read_any_trace(tmp_path / "t.safetensors", Given())[0],
    ):
        assert isinstance(read, Trace)
        assert read.meta == sizes
        for name in ("experts", "tokens", "sequences"):
            np.testing.assert_array_equal(getattr(read, name), getattr(wrote, name))
    write_trace(tmp_path / "bare.safetensors", trace(tokens=None))
    assert read_trace(tmp_path / "bare.safetensors").tokens is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": ids(layers=2)}, "layer_names"),
        ({"experts": ids(k=3)}, "2 slots per token"),
        ({"experts": ids().astype(np.int32)}, "int16"),
        ({"experts": ids(experts=6)}, "ids from 0 below each layer's num_experts"),
        ({"experts": ids() - 2}, "ids from 0 below"),
        ({"experts": np.zeros((N, L, K), np.int16)}, "k different experts"),
        ({"meta": meta(experts_per_token=[K, 1, K])}, "slots beyond a layer's k"),
        ({"meta": meta(vocab_size=6)}, "below vocab_size"),
        ({"tokens": np.arange(3, dtype=np.int32)}, "one id for each of 7 tokens"),
        ({"sequences": np.array([3, 3])}, "sum to the 7 tokens"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        trace(**changes)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _other_version(path: Path) -> None:
    about = {"format": "rmoe.trace", "meta": msgspec.json.encode(meta(schema_version=2)).decode()}
    save_file({"experts": ids(), "sequences": np.array([N])}, path, metadata=about)


def _no_format(path: Path) -> None:
    save_file({"experts": ids()}, path)


def _extra_tensor(path: Path) -> None:
    about = {"format": "rmoe.trace", "meta": msgspec.json.encode(meta()).decode()}
    save_file({"experts": ids(), "sequences": np.array([N]), "more": ids()}, path, metadata=about)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "allowed: a trace written by"),
        (_other_version, "schema_version is 2; allowed: 1"),
        (_no_format, "format is None"),
        (_extra_tensor, "tensors is"),
        (Path.unlink, "No such file"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "t.safetensors"
    write_trace(path, trace())
    damage(path)
    with pytest.raises(RequestError, match=said):
        read_trace(path)


def test_vllm_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    named = msgspec.structs.replace(meta(), layer_names=["layers.1", "layers.2", "layers.4"])
    write_vllm(path, trace(meta=named))
    read, notes = read_any_trace(path, Given(num_experts=E))
    assert isinstance(read, Trace)
    np.testing.assert_array_equal(read.experts, ids())
    np.testing.assert_array_equal(read.tokens, np.arange(N))
    np.testing.assert_array_equal(read.sequences, [3, 4])
    assert read.meta.layer_names == ["layers.1", "layers.2", "layers.4"]
    assert notes == ["layers [0, 3] are zero everywhere: read as dense layers"]


def test_vllm_lines_of_any_text(tmp_path: Path) -> None:
    """From Windows, with signs that end a line for `str.splitlines` and not in a file."""
    answers = [
        {"choices": [{"text": f"a{sign}b", "token_ids": [7], "routed_experts": encoded(ids(2))}]}
        for sign in "\u2028\x85"
    ]
    path = tmp_path / "lines.jsonl"
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\r\n" for answer in answers)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    read, _ = read_any_trace(path, Given(num_experts=E))
    assert isinstance(read, Trace)
    np.testing.assert_array_equal(read.experts, np.concatenate([ids(2), ids(2)]))


@pytest.mark.parametrize("split", [True, False])
def test_vllm_response_of_a_server(tmp_path: Path, split: bool) -> None:
    """Up to 0.21 the prompt's routing stands apart; the last generated token has none."""
    routed = ids(6).astype(np.int32)
    choice = {"token_ids": [7, 8, 9], "routed_experts": encoded(routed[4:] if split else routed)}
    answer = {"prompt_token_ids": [1, 2, 3, 4], "choices": [choice]}
    if split:
        answer["prompt_routed_experts"] = encoded(routed[:4])
    path = tmp_path / "response.json"
    path.write_text(json.dumps(answer, indent=1))
    read, _ = read_any_trace(path, Given(num_experts=E))
    assert isinstance(read, Trace)
    np.testing.assert_array_equal(read.experts, routed)
    np.testing.assert_array_equal(read.tokens, [1, 2, 3, 4, 7, 8])
    np.save(tmp_path / "routed.npy", routed)
    from_array, _ = read_any_trace(tmp_path / "routed.npy", Given(num_experts=E))
    assert isinstance(from_array, Trace)
    np.testing.assert_array_equal(from_array.experts, routed)
    assert from_array.tokens is None


def test_sglang(tmp_path: Path) -> None:
    path = tmp_path / "expert_distribution_rank0_timestamp1.csv"
    path.write_text("layer_id,expert_id,count\n3,0,24\n3,4,6\n4,2,30\n")
    read, _ = read_any_trace(path, Given(num_experts=6, experts_per_token=2))
    assert isinstance(read, ExpertCounts)
    assert read.layer_names == ["layers.3", "layers.4"]
    np.testing.assert_array_equal(read.counts, [[24, 0, 0, 0, 6, 0], [0, 0, 30, 0, 0, 0]])


def test_megatron_ranks_steps_and_what_is_skipped(tmp_path: Path) -> None:
    def line(rank: int, step: int, layer: int, rows: np.ndarray, block: str = "decoder") -> str:
        shape = {"num_tokens": rows.shape[0], "topk": rows.shape[1], "top_indices": rows.tolist()}
        return json.dumps(
            {"step": step, "stage": "pre_dispatch", "block": block, "layer": layer, "rank": rank} | shape
        )

    a, b, c = ids(4), ids(2)[::-1], ids(3)
    first = [line(0, 0, 1, a[:, 0]), line(0, 0, 2, a[:, 1]), line(0, 0, 1, a[:, 2], "mtp")]
    cut = [line(0, 1, 1, c[:, 0])]  # the capture ended in the middle of a step
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(first + cut) + "\n")
    (tmp_path / "router_trace_rank1.jsonl").write_text(
        "\n".join([line(1, 0, 2, b[:, 1]), line(1, 0, 1, b[:, 0])]) + "\n"
    )
    read, notes = read_any_trace(tmp_path, Given(num_experts=E))
    assert isinstance(read, Trace)
    np.testing.assert_array_equal(read.experts, np.concatenate([a[:, :2], b[:, :2]]))
    np.testing.assert_array_equal(read.sequences, [4, 2])
    assert read.meta.layer_names == ["decoder.layers.1", "decoder.layers.2"]
    assert notes == ["1 steps without all layers skipped"]
    alone, _ = read_any_trace(tmp_path / "router_trace_rank1.jsonl", Given(num_experts=E))
    assert isinstance(alone, Trace)
    np.testing.assert_array_equal(alone.experts, b[:, :2])


def test_llama_cpp(tmp_path: Path) -> None:
    """A batch of three tokens, then one at a time; a layer's rows of one batch are contiguous."""
    chosen = ids(5, 2)
    rows = []
    for tokens in (slice(0, 3), slice(3, 4), slice(4, 5)):
        rows += [f"{layer + 1},{e}" for layer in range(2) for e in chosen[tokens, layer].reshape(-1)]
    path = tmp_path / "moe_trace.csv"
    path.write_text("\n".join(rows) + "\n")
    read, _ = read_any_trace(path, Given(num_experts=7, experts_per_token=K))
    assert isinstance(read, Trace)
    np.testing.assert_array_equal(read.experts, chosen)
    assert read.meta.layer_names == ["layers.1", "layers.2"]


def test_llama_cpp_that_wrote_whole_rankings_is_refused(tmp_path: Path) -> None:
    rows = [f"{layer},{e}" for layer in range(2) for e in [3, 1, 0, 2, 2, 0, 1, 3]]  # 4 tokens, k = 2, E = 4
    (tmp_path / "moe_trace.csv").write_text("\n".join(rows))
    with pytest.raises(RequestError, match="one token per batch"):
        read_any_trace(tmp_path / "moe_trace.csv", Given(num_experts=4, experts_per_token=2))


def _vllm(**changes: Any) -> str:
    choice = {"token_ids": [7], "routed_experts": encoded(ids(3).astype(np.int32))} | changes
    prompt = choice.pop("prompt_token_ids", [1, 2, 3])
    return json.dumps({"prompt_token_ids": prompt, "choices": [choice]})


def _archive() -> str:
    buffer = io.BytesIO()
    np.savez(buffer, ids(3))
    return base64.b64encode(buffer.getvalue()).decode()


def _huge() -> str:
    """A header that claims 16 TiB, and 64 bytes."""
    buffer = io.BytesIO()
    header = {"descr": "<i4", "fortran_order": False, "shape": (1 << 40, 2, 2)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return base64.b64encode(buffer.getvalue() + bytes(64)).decode()


def _megatron(**changes: Any) -> str:
    line = {"rank": 0, "step": 0, "layer": 1, "num_tokens": 2, "topk": 2, "top_indices": [[0, 1], [2, 3]]}
    return json.dumps(line | changes)


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("hello\n", Given(E, K), "a file in a known format"),
        ("", Given(E, K), "a file in a known format"),
        ('{"a": 1}', Given(E, K), "a file in a known format"),
        ('{"choices": ', Given(E, K), "a file in a known format"),
        (
            _vllm(),
            Given(),
            "--experts is None; allowed: experts per layer, which a vLLM trace does not say: more than 4",
        ),
        (_vllm(), Given(4), "more than 4"),
        (_vllm(), Given(E, 3), "--experts-per-token is 3; allowed: what the trace says: 2"),
        (_vllm(routed_experts=None), Given(E), "with routed_experts"),
        (_vllm(routed_experts="!!"), Given(E), "base64"),
        (_vllm(routed_experts=encoded(ids(3).astype(float))), Given(E), "integers"),
        (_vllm(token_ids=[7, 8, 9]), Given(E), "routing for 5 tokens"),
        (_vllm(prompt_token_ids=[1.9, True, 2]), Given(E), "token ids that are whole numbers"),
        (_vllm(prompt_token_ids=["a", "b", "c"]), Given(E), "token ids that are whole numbers"),
        (_vllm(prompt_token_ids=[1, 2, 3_000_000_000]), Given(E), "token ids that are whole numbers"),
        (_vllm(token_ids=7), Given(E), "a file in a known format"),
        (_vllm(routed_experts=_archive()), Given(E), "a whole NumPy file"),
        (_vllm(routed_experts=_huge()), Given(E), "a whole NumPy file"),
        ('{"choices": [1]}', Given(E), "a file in a known format"),
        (f"layer_id,expert_id,count\n0,0,{'9' * 20}\n", Given(E, K), "a file in a known format"),
        (f"layer_id,expert_id,count\n0,0,{'9' * 5000}\n", Given(E, K), "a file in a known format"),
        (_megatron(top_indices=[[0.2, 1.7], [2.9, 3.1]]), Given(E), "not whole numbers"),
        (_megatron(top_indices=["01", "23"]), Given(E), "not whole numbers"),
        (_megatron(top_indices=[[0, None], [2, 3]]), Given(E), "not whole numbers"),
        (_megatron(top_indices=[[], []], topk=0), Given(E), "one or more for each token"),
        ("layer_id,expert_id,count\n0,1\n", Given(E, K), "line 2: 0,1"),
        ("layer_id,expert_id,count\n0,1,2\n0,1,3\n", Given(E, K), "one row for layer 0, expert 1"),
        ("0,1\n0,2\n0,3\n", Given(E, K), "whole number of tokens, of 2 rows"),
        ("0,1\n0,2\n", Given(E), "k, which a llama.cpp trace does not say"),
        ("0,1\n0,-2\n", Given(E, K), "line 2: 0,-2"),
        ("0,1\n0,1\n", Given(E, K), "k different experts"),
        ('{"top_indices": [[0, 1]], "num_tokens": 2, "topk": 2}', Given(E), "do not fit top_indices"),
        (
            '{"top_indices": [[0, 1]], "num_tokens": 1, "topk": 2, "rank": 0}',
            Given(E),
            "lines with rank, step",
        ),
    ],
)
def test_bad_traces_of_others(tmp_path: Path, text: str, given: Given, said: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(RequestError, match=said) as error:
        read_any_trace(tmp_path / "t", given)
    assert "\n" not in str(error.value)
