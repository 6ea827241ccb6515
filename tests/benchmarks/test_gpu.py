"""`benchmarks.gpu` at toy size, on the CPU: checks, cases, training, one file; and checks that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import checks
from benchmarks.cases import CASES, setting_for
from benchmarks.gpu import TURNS, Turn, run
from benchmarks.measure import Roofline
from rmoe.data.config import DataConfig
from rmoe.model.experts import ACTIVATIONS
from rmoe.training.config import ModelConfig, RunConfig, TrainingConfig


def config_of(folder: Path) -> RunConfig:
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: the cat sat on mat {i * 7919 % 101}\n" for i in range(800)))
    return RunConfig(
        model=ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4,
                          moe_intermediate_size=8),
        data=DataConfig(path=str(text), cache_dir=str(folder / "cache")),
        training=TrainingConfig(max_steps=20, batch_size=2, sequence_length=32, threads=1),
    )  # fmt: skip


def test_everything_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROUTERS", ("rmoe",))
    monkeypatch.setattr("benchmarks.suite.measure_roofline", lambda *_: Roofline(100.0, 10.0))
    monkeypatch.delitem(checks.ARCHITECTURES, "post-norm ReLU")
    path = tmp_path / "2026-01-01-gpu.json"
    turns = (Turn("router", "toy", only=("rmoe",)), Turn("data", "toy", only=("random slices",)))
    report = run(config_of(tmp_path), turns, seconds=100, rounds=1, path=path, compiled=False)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert all(check["passed"] for check in report["checks"])
    assert [result["case"] for result in report["results"]] == ["router", "data"]
    assert [row["router"] for row in report["training"]] == ["smoe", "rmoe"]
    assert all(row["steps"] == 20 and 0 < row["val_bits_per_byte"] < 9 for row in report["training"])
    text = path.with_suffix(".md").read_text()
    assert "not measured on a GPU" in text
    assert "## Training" in text
    assert f"{len(report['checks'])} of {len(report['checks'])} within bounds" in text


def test_what_there_is_no_time_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.run_checks", lambda device, compiled: [])
    monkeypatch.setattr("benchmarks.gpu.train_both", lambda config, seconds: [])
    path = tmp_path / "gpu.json"
    report = run(
        config_of(tmp_path), (Turn("router", "toy"),), seconds=0.0, rounds=1, path=path, compiled=False
    )
    assert report["left_out"] == ["router, toy"]
    assert "Not reached in time: router, toy" in path.with_suffix(".md").read_text()


def test_turns_name_cases_and_contestants_there_are() -> None:
    for turn in TURNS:
        contestants = CASES[turn.case].contestants(setting_for(turn.size, "cuda"))
        assert set(turn.only) <= set(contestants), turn


def test_a_wrong_path_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    silu, right = ACTIVATIONS["silu"]
    monkeypatch.setitem(ACTIVATIONS, "silu", (silu, lambda grad, x: right(grad, x) * 1.001))
    choice = checks.ARCHITECTURES["pre-norm SwiGLU"]
    assert checks.experts_error(choice, "sorted_mm", torch.float32, "random", "cpu") > 1e-5
    assert checks.experts_error(choice, "eager", torch.float32, "random", "cpu") < 1e-5


def test_what_does_not_run_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ROUTERS", ("rmoe",))
    for name in ("experts_error", "model_error", "decode_error"):
        monkeypatch.setattr(checks, name, lambda *_, **__: 0.0)

    def broken(*_: object) -> float:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(checks, "router_error", broken)
    found = checks.run_checks("cpu", compiled=False)
    (failed,) = [check for check in found if not check.passed]
    assert failed.problem == "RuntimeError: no such kernel"


@pytest.mark.slow
def test_compiled_paths() -> None:
    for architecture in checks.ARCHITECTURES.values():
        assert checks.model_error(architecture, "cpu", chunked=True, compiled=True) < 1e-4
    assert checks.decode_error("cpu", compiled=True) < 1e-4
