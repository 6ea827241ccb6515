"""`rmoe trace` and `rmoe analyze --trace`: the same values as from the model, and every request they refuse."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmoe.analysis.tracing import _ranked, analyze_trace
from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer
from rmoe.moe import RoutingRecord
from rmoe.results.analysis import read_analysis
from rmoe.results.engine_traces import Given, read_any_trace
from rmoe.results.trace import NO_EXPERT, Trace, TraceMeta, read_trace
from tests.analysis.tiny_families import TINY
from tests.analysis.tiny_rmoe import tiny_rmoe

TOKENS = ["--tokens", "600", "--sequence-length", "32"]
OF_CHOICE = ("frequency", "load_imbalance", "drop_ratio", "coactivation", "paths", "mi_chosen", "top_tokens")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    return path


def _saved(family: str, folder: Path) -> Path:
    (TINY[family].build() if family in TINY else tiny_rmoe(family)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "zaya", "rmoe", "top-p", "remoe", "hunyuan"])
def test_a_trace_gives_what_the_model_gives(family: str, text: Path, tmp_path: Path) -> None:
    model = _saved(family, tmp_path / family)
    direct, traced, file = tmp_path / "direct", tmp_path / "traced", tmp_path / "t.safetensors"
    given = [str(model), "--data", str(text), *TOKENS]
    assert main(["analyze", *given, "--out", str(direct), "--gradient-tokens", "0"]) == 0
    assert main(["trace", *given, "--out", str(file)]) == 0
    assert main(["analyze", str(model), "--trace", str(file), "--out", str(traced)]) == 0
    (one,), (other,) = (read_analysis(p / "analysis.json").models for p in (direct, traced))
    for name in OF_CHOICE:
        assert getattr(one, name) == getattr(other, name), name
    assert (one.layers, one.experts, one.layer_names) == (other.layers, other.experts, other.layer_names)
    assert other.entropy is None


def test_memory_does_not_go_by_the_largest_token_id() -> None:
    """Two equal traces but for one id, 5 there and 2e9 here, which as a table's length would be 16 GB."""
    experts = np.array([[[0, 1]], [[2, 1]], [[3, 0]]] * 40, np.int16)
    meta = TraceMeta(
        model="m", source="rmoe", layer_names=["a"], num_experts=[4], experts_per_token=[2], ranked=True
    )
    found = {}
    for last in (5, 2_000_000_000):
        tokens = np.array([3, 4, last] * 40, np.int32)
        trace = Trace(experts, tokens, np.array([120]), meta)
        tracemalloc.start()
        found[last], _ = analyze_trace(trace, "m", lambda token: "end" if token > 4 else str(token))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        tracemalloc.stop()
    assert found[5].top_tokens == found[2_000_000_000].top_tokens
    assert "end" in str(found[5].top_tokens)


def test_slots_are_ranked_and_layers_of_different_sizes_are_padded() -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    narrow = RoutingRecord(
        probs, probs, torch.tensor([[1], [3]]), torch.ones(2, 1), 3
    )  # the second token: no expert
    four = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    wide = RoutingRecord(four, four, torch.tensor([[1, 3], [3, 2]]), torch.ones(2, 2), 4)
    expected = [[[1, NO_EXPERT], [3, 1]], [[NO_EXPERT, NO_EXPERT], [2, 3]]]
    np.testing.assert_array_equal(_ranked([narrow, wide]), expected)


def test_vllm_form_of_a_model_with_a_dense_layer(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _saved("deepseek_v3", tmp_path / "m")
    file, ours = tmp_path / "r.jsonl", tmp_path / "t.safetensors"
    given = ["trace", str(model), "--data", str(text), *TOKENS]
    assert main([*given, "--format", "vllm", "--out", str(file)]) == 0
    assert main([*given, "--out", str(ours)]) == 0
    assert main(["analyze", str(model), "--trace", str(file), "--out", str(tmp_path / "a")]) == 0
    (read,) = read_analysis(tmp_path / "a" / "analysis.json").models
    counts = [
        np.bincount(layer.reshape(-1), minlength=read.experts)
        for layer in read_trace(ours).experts.swapaxes(0, 1)
    ]
    np.testing.assert_allclose(read.frequency, [c / c.sum() for c in counts])
    assert read.paths is None
    assert "does not rank a token's experts" in capsys.readouterr().out


@pytest.mark.parametrize("beside", [True, False])  # the prompt's part: beside `choices` up to vLLM 0.21
def test_a_prompt_with_several_answers_is_read_once(beside: bool, tmp_path: Path) -> None:
    def encoded(experts: np.ndarray) -> str:
        file = io.BytesIO()
        np.save(file, experts)
        return base64.b64encode(file.getvalue()).decode()

    prompt, answers = [1, 2, 3, 4], [[5, 6, 7], [8, 9], [10]]
    routed = np.arange(1, 7, dtype=np.int16)[:, None, None] * np.ones((1, 2, 1), np.int16)
    choices = []
    for ids in answers:
        whole = routed[: len(prompt) + len(ids) - 1]
        own = whole[len(prompt) :] if beside else whole
        choices.append(
            {"token_ids": ids} | ({"routed_experts": encoded(own)} if len(own) else {"routed_experts": None})
        )
    response: dict[str, Any] = {"prompt_token_ids": prompt, "choices": choices}
    if beside:
        response["prompt_routed_experts"] = encoded(routed[: len(prompt)])
    (tmp_path / "r.json").write_text(json.dumps(response))
    trace, _ = read_any_trace(tmp_path / "r.json", Given(num_experts=8))
    assert isinstance(trace, Trace)
    assert trace.tokens is not None
    assert trace.tokens.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert trace.experts[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 5]
    assert trace.sequences.tolist() == [6, 1]


def test_the_measures_of_a_trace_are_chosen(text: Path, tmp_path: Path) -> None:
    model, file = _saved("olmoe", tmp_path / "m"), tmp_path / "t.safetensors"
    assert main(["trace", str(model), "--data", str(text), *TOKENS, "--out", str(file)]) == 0
    assert main(["analyze", "--trace", str(file), "--measures", "paths", "--out", str(tmp_path / "a")]) == 0
    read = read_analysis(tmp_path / "a" / "analysis.json")
    assert read.text.tokens == 576
    for name in OF_CHOICE:
        assert (getattr(read.models[0], name) is not None) == (name == "paths"), name


def test_counts_alone(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("layer_id,expert_id,count\n0,0,3\n0,1,1\n1,2,4\n")
    given = ["analyze", "--trace", str(tmp_path / "c.csv"), "--experts", "3", "--experts-per-token", "2"]
    assert main([*given, "--out", str(tmp_path / "a")]) == 0
    (read,) = read_analysis(tmp_path / "a" / "analysis.json").models
    assert read.frequency == [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    assert read.frequency_n == 2
    assert read.load_imbalance is not None
    assert read.load_imbalance.values == [2.25, 3.0]


def test_refused_requests(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    olmoe = _saved("olmoe", tmp_path / "olmoe")
    byte_tokenizer().save_pretrained(olmoe)
    file = tmp_path / "t.safetensors"
    assert main(["trace", str(olmoe), "--data", str(text), *TOKENS, "--out", str(file)]) == 0
    for name, change in (
        ("layers", {"num_hidden_layers": 5}),
        ("k", {"num_experts_per_tok": 3}),
        ("ids", {"vocab_size": 80}),
    ):
        other = tmp_path / name
        other.mkdir()
        config = json.loads((olmoe / "config.json").read_text()) | change
        (other / "config.json").write_text(json.dumps(config))
    counts, sizes = tmp_path / "c.csv", ["--experts", "3", "--experts-per-token", "2"]
    counts.write_text("layer_id,expert_id,count\n0,0,3\n0,1,1\n")
    mark, nothing = tmp_path / "mark.csv", tmp_path / "nothing.csv"
    mark.write_bytes(b"\xef\xbb\xbf")
    nothing.write_text("layer_id,expert_id,count\n0,0,0\n")
    capsys.readouterr()
    for arguments, said in (
        ([str(tmp_path / "layers"), "--trace", str(file)], "allowed: the model's 5"),
        (
            [str(tmp_path / "k"), "--trace", str(file)],
            "--trace is 'a trace with (experts, k) (8, 2) in layer 0'; allowed: the model's (8, 3)",
        ),
        ([str(tmp_path / "ids"), "--trace", str(file)], "ids below the model's vocabulary size (80)"),
        (["--trace", str(text)], "a file in a known format"),
        (["--trace", str(tmp_path / "none")], "--trace is"),
        (["--trace", str(file), "--data", str(text)], "--data is"),
        (["--trace", str(file), "--stream"], "--stream is"),
        (["--trace", str(file), "--device", "cpu"], "--device is 'cpu'; allowed: unset with --trace"),
        (["--trace", str(file), "--dtype", "bf16"], "--dtype is"),
        (["--trace", str(file), "--tokens", "8"], "--tokens is 8"),
        (["--trace", str(file), "--split", "test"], "--split is"),
        (["--trace", str(file), "--no-check"], "--no-check is True"),
        (
            ["--trace", str(file), "--measures", "load,confidence"],
            "--measures is 'confidence'; allowed: load, ",
        ),
        (["--trace", str(counts), *sizes, "--measures", "paths"], "load, all that a sglang trace tells"),
        (["--trace", str(mark)], "a file in a known format"),
        (["--trace", str(nothing), *sizes], "at least one token"),
        ([str(olmoe), "--measures", ""], "--measures is ''; allowed: load, coactivation"),
        ([str(olmoe), "--experts", "8"], "--experts is 8; allowed: unset without --trace"),
        ([], "MODEL is None"),
    ):
        assert main(["analyze", *arguments, "--out", str(out)]) == 2, arguments
        line = capsys.readouterr().err
        assert said in line, arguments
        assert line.count("\n") == 1
        assert not out.exists()
    for taken, said in ((tmp_path, "a file"), (tmp_path / "one.trace", "a name that ends in .safetensors")):
        assert main(["trace", str(olmoe), "--data", str(text), *TOKENS, "--out", str(taken)]) == 2
        assert f"--out is '{taken}'; allowed: {said}" in capsys.readouterr().err
