"""The experiments' own code: their files hold together, and one is carried out at toy size."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from experiments import run

SIZE = """
[model]
hidden_size = 16
num_hidden_layers = 2
num_attention_heads = 2
num_experts = 4
moe_intermediate_size = 8
hidden_dropout = 0.0
[training]
max_steps = 10
batch_size = 2
sequence_length = 16
warmup_steps = 1
threads = 1
[logging]
every = 1
final_blocks = 4
"""

EXPERIMENT = """
question = "Does it run?"
families = ["loss", "phases", "routing", "gradients"]
table = ["test", "entropy", "balance_share@0.1"]
[[grid]]
routers = ["smoe", "rmoe-p{p}"]
seeds = 2
settings = { "checkpoints.keep" = 20 }
[[statement]]
says = "entropy differs"
part = [{ figure = "entropy", router = "rmoe-p{p}", expect = "same", margin = 10.0 }]
"""


def test_the_examples_in_its_documentation() -> None:
    """Here, not by pytest's own collection: that would import the plugin and register its routers for all tests."""
    assert doctest.testmod(run).failed == 0


@pytest.mark.parametrize("name", run.NAMES)
def test_an_experiment_names_what_it_trains(name: str) -> None:
    run.require_whole(name, run.read(name, "cpu"))


@pytest.mark.parametrize("size", run.STATE_WIDTH)
def test_a_size_is_a_configuration(size: str, tmp_path: Path) -> None:
    place = run.Workplace(size, tmp_path / "text", tmp_path, tmp_path, None)
    for name in run.NAMES:
        for grid in run.read(name, size).grid:
            assert place.config(grid).model.num_experts == 16


def test_a_part_about_an_untrained_router_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    broken = run.Experiment(
        question="?",
        families=["loss"],
        table=[],
        grid=[run.Grid(["smoe"])],
        statement=[run.Statement("x", [run.Part("test", "rmoe")])],
    )
    with pytest.raises(run.RequestError, match="rmoe in main"):
        run.require_whole("broken", broken)
    assert run.main(["nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_experiment_from_its_file_to_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "size-cpu.toml").write_text(SIZE)
    (tmp_path / "toy.toml").write_text(EXPERIMENT)
    (tmp_path / "text.txt").write_text("a routed text, read again and again\n" * 400)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "NAMES", ("toy",))
    asked = ["toy", "--data-dir", str(tmp_path), "--text", "text.txt", "--out", str(tmp_path / "runs")]
    asked += ["--results", str(tmp_path / "results"), "--jobs", "1"]
    assert run.main(asked) == 0
    found = json.loads((tmp_path / "results" / "toy-cpu.json").read_text())
    figures = found["figures"]["main"]
    assert set(figures) == {"smoe", "rmoe-p32"}
    for by_seed in figures.values():
        for one in by_seed.values():
            assert 0 < one["entropy"] < 1.4
            assert 0 < one["balance_share@0.1"] < 1
            assert one["gate_entropy@0.1"] > 0
    (part,) = found["judged"][0]
    differences = [
        figures["rmoe-p32"][seed]["entropy"] - figures["smoe"][seed]["entropy"] for seed in ("0", "1")
    ]
    assert list(part["differences"].values()) == differences
    assert part["interval"]["low"] < part["mean"] < part["interval"]["high"]
    assert part["verdict"] == "seen"
    table = (tmp_path / "results" / "toy-cpu.md").read_text()
    assert "| entropy differs | **seen** |" in table
    results = tmp_path / "runs" / "main" / "results.jsonl"
    trained = results.read_bytes()
    assert run.main(asked) == 0  # again: nothing is trained twice
    assert results.read_bytes() == trained
