"""The suite at toy size: every case gives figures, parts merge, and a case whose tests are red is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases import CASES, COMPILED, Case, setting_for
from benchmarks.contestant import Contestant, Work
from benchmarks.measure import Roofline
from benchmarks.report import as_markdown
from benchmarks.sizes import MEDIUM
from benchmarks.suite import (
    beside,
    chosen,
    extra_of_the_router,
    groups,
    main,
    measure,
    memory_of,
    merge,
    new_report,
    run_cases,
)

TOY = setting_for("toy", "cpu")
QUICK_ONES = [name for name in CASES if name not in ("start-up", "decode 64")]


@pytest.fixture(autouse=True)
def roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's rate takes seconds to measure, and no test here is about it."""
    monkeypatch.setattr("benchmarks.suite.measure_roofline", lambda *_: Roofline(100.0, 10.0))


@pytest.mark.parametrize("name", QUICK_ONES)
def test_every_case_gives_figures(name: str) -> None:
    contestants = chosen(CASES[name].contestants(TOY), (), eager=True)
    result = measure(CASES[name], TOY, contestants, rounds=1)
    assert [row["contestant"] for row in result["rows"]] == list(contestants)
    assert all(row["wall_ms"] > 0 and row["cpu_ms"] > 0 for row in result["rows"])
    assert result["rows"][0]["ratio"] == 1
    assert all(
        ("roofline_ms" in row) == bool(contestants[row["contestant"]].phases) for row in result["rows"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "start-up"])
def test_compiled_contestants(name: str) -> None:
    contestants = CASES[name].contestants(TOY)
    compiled = {n: c for n, c in contestants.items() if n.endswith(COMPILED)}
    if compiled:
        assert measure(CASES[name], TOY, compiled, rounds=1)["rows"]


def test_start_up() -> None:
    contestants = chosen(CASES["start-up"].contestants(TOY), ("rmoe --help",), eager=True)
    (row,) = measure(CASES["start-up"], TOY, contestants, rounds=1)["rows"]
    assert row["wall_ms"] > 0
    (row,) = memory_of(CASES["start-up"], TOY, contestants)["rows"]
    assert 5 < row["peak_mib"] < 500


def test_only_what_is_asked_for_beside_the_first() -> None:
    all_of_them = CASES["step"].contestants(TOY)
    assert list(chosen(all_of_them, ("rmoe",), eager=False)) == ["smoe", "rmoe"]
    assert list(chosen(all_of_them, (), eager=False)) == list(all_of_them)
    assert not [name for name in chosen(all_of_them, (), eager=True) if name.endswith(COMPILED)]


def test_groups_share_the_first() -> None:
    assert groups(["a", "b", "c", "d"], 3) == [["a", "b", "c"], ["a", "d"]]
    assert groups(["a"], 3) == [["a"]]
    assert groups(["a", "b"], 1) == [["a", "b"]]


def test_a_row_of_a_later_group_is_paired_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = replace(TOY, size=replace(TOY.size, together=2))
    contestants = chosen(CASES["router"].contestants(TOY), ("rmoe", "eda"), eager=True)
    rows = measure(CASES["router"], setting, contestants, rounds=3)["rows"]
    assert [row["contestant"] for row in rows] == ["smoe", "rmoe", "eda"]
    assert all(row["ratio"] > 1 for row in rows[1:])


def test_red_tests_refuse_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_it():\n    assert False\n")
    case = Case("router", lambda setting: pytest.fail("measured"), (str(red),))
    monkeypatch.setitem(CASES, "router", case)
    told = []
    results = run_cases(["router"], ["toy"], "cpu", 1, each=told.append)
    assert results == told == [{"case": "router", "size": None, "refused": f"tests are red: {red}"}]
    assert "refused" in as_markdown({**new_report(1), "results": results})


def test_parts_of_a_report_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    for case, rounds in (("data", "1"), ("router", "1"), ("data", "2")):
        options = (
            f"--cases {case} --sizes toy --rounds {rounds} --eager --parts times --without-tests --name part"
        )
        monkeypatch.setattr("sys.argv", ["suite", *options.split(), "--out", str(tmp_path)])
        main()
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert [(result["case"], result["rounds"]) for result in report["results"]] == [
        ("router", 1),
        ("data", 2),
    ]
    text = path.with_suffix(".md").read_text()
    assert report["versions"]["libraries"]["torch"] in text
    assert report["hardware"]["cpu"] in text
    assert "| rmoe |" in text


def test_new_times_keep_memory_and_nothing_else() -> None:
    report = new_report(1)
    result = {"case": "step", "size": {"name": "toy"}}
    old = {"contestant": "smoe", "wall_ms": 2.0, "product_ms": 1.0, "peak_mib": 5.0, "memory_ratio": 1.0}
    merge(report, {**result, "rows": [old]})
    merge(report, {**result, "rows": [{"contestant": "smoe", "wall_ms": 3.0}]})
    merge(report, {**result, "rows": [{"contestant": "smoe", "peak_mib": 6.0}]})
    assert report["results"][0]["rows"] == [
        {"contestant": "smoe", "wall_ms": 3.0, "peak_mib": 6.0, "memory_ratio": 1.0}
    ]


def test_merging_keeps_sizes_apart() -> None:
    report = new_report(1)
    for size, mark in (("toy", 1), ("quick", 2), ("toy", 3)):
        merge(report, {"case": "step", "size": {"name": size}, "mark": mark})
    assert [result["mark"] for result in report["results"]] == [3, 2]


def test_times_and_memory_of_one_case_become_one_table() -> None:
    report, size = new_report(1), {"name": "toy"}
    times = {"rounds": 20, "rows": [{"contestant": "a", "wall_ms": 1.0}, {"contestant": "b", "wall_ms": 2.0}]}
    memory = {"memory": "tensors", "rows": [{"contestant": "a", "peak_mib": 3.0}]}
    again = {"rows": [{"contestant": "b", "wall_ms": 4.0}]}
    for part in (times, memory, again):
        merge(report, {"case": "step", "size": size, **part})
    (result,) = report["results"]
    assert result["rows"] == [
        {"contestant": "a", "wall_ms": 1.0, "peak_mib": 3.0},
        {"contestant": "b", "wall_ms": 4.0},
    ]
    assert (result["rounds"], result["memory"]) == (20, "tensors")


def test_extra_work_beside_its_roofline() -> None:
    """Figures put in by hand: 10 % more time, where the added FLOPs alone would be 5 %."""
    size = TOY.size
    added = 3.0 * size.tokens * (size.router_flops("rmoe") - size.router_flops("smoe"))
    rows = [
        {"contestant": "smoe", "ratio": 1.0, "wall_ms": 20 * added / 1e6},
        {"contestant": "rmoe", "ratio": 1.1, "wall_ms": 22 * added / 1e6},
    ]
    extra_of_the_router({"rows": rows, "roofline": {"gflops": 1.0}}, TOY)
    assert rows[1]["extra"] == pytest.approx(0.1)
    assert rows[1]["extra_by_roofline"] == pytest.approx(0.05)


def test_flops_by_count() -> None:
    """The issue's own count: the recurrent router adds 11.8 % to the medium model."""
    added = MEDIUM.step_flops("rmoe") / MEDIUM.step_flops("smoe") - 1
    assert 0.09 < added < 0.13
    assert replace(MEDIUM, layers=16).expert_flops() == 2 * MEDIUM.expert_flops()
    assert MEDIUM.parameters(10_000) == pytest.approx(MEDIUM.parameters())
    one = MEDIUM.parameters() - MEDIUM.parameters(1)
    assert one == MEDIUM.layers * (1 - 2 / 16) * MEDIUM.expert_weights()


def test_share_and_rate_of_a_row() -> None:
    row = {"wall_ms": 4.0, "product_ms": 2.0, "attention_ms": 0.0, "product_room_gflop": 2.0}
    beside(row, (Work(1e9, 0.0), Work(0.0, 1e9)), 100, Roofline(1000.0, 1000.0))
    assert row["roofline_ms"] == pytest.approx(2.0)
    assert row["share_of_roofline"] == pytest.approx(0.5)
    assert row["products_share_of_rate"] == pytest.approx(0.5)
    assert row["tokens_per_s"] == pytest.approx(25_000)


def test_a_contestant_is_built_when_measured() -> None:
    built = []
    contestant = Contestant(lambda: built.append(1) or (lambda: None))
    assert not built
    contestant.build()()
    assert built == [1]
