"""The graft study: ways start at one function, a stopped study resumes, mixed codes are refused."""

from __future__ import annotations

import msgspec
import pytest
import torch

from experiments import graft_study
from experiments.graft_study import GraftRow, Size, markdown
from experiments.lines import read_rows
from rmoe.data import prepare
from rmoe.data.config import DataConfig
from rmoe.errors import RequestError, RunError
from rmoe.results.run import Hardware, Versions

TINY = Size(
    layers=2, hidden=16, experts=4, length=32, batch=2, base_steps=4, steps=3, warmup=1, evaluation_blocks=4
)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two texts, under the names that the study knows."""
    monkeypatch.setenv("RMOE_CACHE", str(tmp_path / "cache"))
    for name, words in (("one.txt", "a text of its own. "), ("two.txt", "def f(x): return x\n")):
        (tmp_path / name).write_text(words * 800)
    monkeypatch.setattr(graft_study, "FIRST", "one.txt")
    monkeypatch.setattr(graft_study, "SECOND", "two.txt")
    return tmp_path


def test_grafts_start_at_the_bases_function():
    ids = torch.arange(24).reshape(2, 12)
    base = graft_study.base_model(TINY, 64, 0).eval()
    plain = base(input_ids=ids).logits
    for way in ("nothing new", "rmoe", "eda-linear", "low-rank"):
        model = graft_study.base_model(TINY, 64, 0).eval()
        graft_study.WAYS[way](model, 0)
        assert torch.equal(model(input_ids=ids).logits, plain), way
        assert all(p.requires_grad for p in model.parameters())
    model = graft_study.base_model(TINY, 64, 0)
    graft_study.WAYS["router alone"](model, 0)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(TINY.layers)
    ]


def test_a_stopped_study_resumes_to_the_same_rows(texts):
    whole, parts = texts / "whole.jsonl", texts / "parts.jsonl"
    ways = ("nothing new", "rmoe")
    graft_study.run(texts, texts / "out", range(2), TINY, whole, ways)
    graft_study.run(texts, texts / "again", range(1), TINY, parts, ways[:1])
    graft_study.run(texts, texts / "again", range(2), TINY, parts, ways)
    values = [
        {(r.way, r.seed): (r.first, r.second) for r in read_rows(path, GraftRow)} for path in (whole, parts)
    ]
    assert values[0] == values[1]
    assert len(values[0]) == 4
    assert len(set(values[0].values())) == 4
    table = markdown(read_rows(whole, GraftRow))
    assert table.count("| rmoe | 2 |") == 2


def test_a_loss_that_is_not_finite_ends_in_one_line(texts):
    corpus = prepare(DataConfig(path=str(texts / "one.txt")), TINY.length)
    model = graft_study.base_model(TINY, corpus.vocab_size, 0)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(RunError, match="the loss is nan at step 0; saved: the finished runs"):
        graft_study.train(model, corpus, 2, 0.1, 0, TINY)


def test_a_line_that_a_kill_cut_short_is_run_again(texts):
    results = texts / "results.jsonl"
    graft_study.run(texts, texts / "out", range(2), TINY, results, ("nothing new",))
    whole = read_rows(results, GraftRow)
    results.write_bytes(results.read_bytes()[:-40])
    assert [row.key for row in read_rows(results, GraftRow)] == [("nothing new", 0)]
    graft_study.run(texts, texts / "out", range(2), TINY, results, ("nothing new",))
    values = [
        [(row.key, row.first, row.second) for row in rows] for rows in (whole, read_rows(results, GraftRow))
    ]
    assert values[0] == values[1]


def test_runs_of_another_size_are_refused(texts):
    results = texts / "results.jsonl"
    graft_study.run(texts, texts / "out", range(1), TINY, results, ("nothing new",))
    with pytest.raises(RequestError, match="size"):
        graft_study.run(texts, texts / "out", range(1), msgspec.structs.replace(TINY, steps=4), results)
    row = read_rows(results, GraftRow)[0]
    row = msgspec.structs.replace(row, versions=msgspec.structs.replace(row.versions, code="another"))
    results.write_bytes(msgspec.json.encode(row) + b"\n")
    with pytest.raises(RequestError, match="versions"):
        graft_study.run(texts, texts / "out", range(1), TINY, results)


def test_the_table_is_its_rows():
    def row(way: str, seed: int, second: float) -> GraftRow:
        return GraftRow(
            way=way,
            seed=seed,
            first=2.0,
            second=second,
            base_first=2.0,
            base_second=3.0,
            trained_parameters=10,
            seconds=1.0,
            size=TINY,
            versions=Versions(code="none", python="3", libraries={}),
            hardware=Hardware(cpu="none", cores=1, threads=1, memory_gib=1.0, accelerator=None),
        )

    rows = [row("nothing new", seed, 2.0 + seed / 100) for seed in range(3)]
    rows += [row("rmoe", seed, second) for seed, second in enumerate((1.9, 1.92, 1.91))]
    rows += [row("low-rank", seed, second) for seed, second in enumerate((1.91, 1.91, 1.93))]
    # differences -0.1, -0.09, -0.11: mean -0.1, half-width 4.303 x 0.01 / sqrt(3); to low-rank -0.01, 0.01, -0.02
    memory = "-0.0067 (-0.0446 to +0.0313), not decided"
    line = f"| `tech.txt.gz` | rmoe | 3 | 10 | 1.9100 | -0.1000 (-0.1248 to -0.0752), better | {memory} |"
    table = markdown(rows)
    assert line in table
    assert "| `tech.txt.gz` | nothing new | 3 | 10 | 2.0100 |  |  |" in table
    assert "-0.1000 (-0.1248 to -0.0752), better" not in markdown(rows[:3] + rows[6:])
