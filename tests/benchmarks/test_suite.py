"""The suite at toy size: every case gives figures, and a case whose tests are red is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cases import CASES, Case, Setting
from benchmarks.measure import Roofline, compare
from benchmarks.sizes import MEDIUM, ON_CPU
from benchmarks.suite import as_markdown, make_report, run_cases, write_report

TOY = Setting(ON_CPU["toy"], "cpu", Roofline(100.0, 10.0), rounds=2)


@pytest.mark.parametrize("name", ["router", "block", "step", "prefill"])
def test_every_case_gives_figures(name: str) -> None:
    rows = CASES[name].measure(TOY)
    assert len(rows) >= 3
    assert all(row["wall_ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "peak memory", "start-up"])
def test_slower_cases(name: str) -> None:
    assert all(row.get("wall_ms", row.get("peak_mib")) >= 0 for row in CASES[name].measure(TOY))


def test_red_tests_refuse_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red = tmp_path / "test_red.py"
    red.write_text("def test_it():\n    assert False\n")
    case = Case("router", lambda setting: pytest.fail("measured"), (str(red),))
    monkeypatch.setitem(CASES, "router", case)
    results = run_cases(["router"], [TOY])
    assert results == [{"case": "router", "refused": f"tests are red: {red}"}]


def test_report_names_machine_and_versions(tmp_path: Path) -> None:
    report = make_report(["router"], [TOY], rounds=2, check_tests=False)
    table = write_report(report, tmp_path, "toy")
    assert json.loads(table.with_suffix(".json").read_text())["hardware"] == report["hardware"]
    text = as_markdown(report)
    assert report["versions"]["libraries"]["torch"] in text
    assert report["hardware"]["cpu"] in text
    assert "| rmoe |" in text


def test_contestants_take_turns() -> None:
    order: list[str] = []
    compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b", "b", "a"] * 2 or order == ["b", "a", "a", "b"] * 2


def test_flops_by_count() -> None:
    """The issue's own count: the recurrent router adds 11.8 % to the medium model."""
    added = MEDIUM.step_flops("rmoe") / MEDIUM.step_flops("smoe") - 1
    assert 0.09 < added < 0.13
    assert Roofline(100.0, 10.0).seconds(2e11, 1e10) == 2.0
    assert replace(MEDIUM, layers=16).expert_flops() == 2 * MEDIUM.expert_flops()
