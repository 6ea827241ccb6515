"""results.jsonl: what is read back, what is refused, what is passed over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from rmoe.compare.summary import summarise
from rmoe.errors import RequestError
from rmoe.records import append_records
from rmoe.results.rows import read_rows
from tests.compare.rows import changed, row


def test_round_trip(tmp_path):
    path = tmp_path / "results.jsonl"
    written = [row("smoe", 0, 1.7), row("rmoe", 0, 1.6)]
    for one in written:
        append_records(path, one)
    assert read_rows(path) == (written, [])


def test_a_later_line_of_the_same_run_stands(tmp_path):
    path = tmp_path / "results.jsonl"
    first = row("smoe", 0, 1.7, test=None)
    append_records(path, first)
    append_records(path, row("rmoe", 0, 1.6))
    append_records(path, changed(first, test=1.8))
    rows, _ = read_rows(path)
    assert [(r.router, r.result.test) for r in rows] == [("smoe", 1.8), ("rmoe", 2.0)]


def test_a_line_cut_short_is_said_and_the_rest_reported(tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, row("smoe", 0, 1.7))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    rows, problems = read_rows(path)
    assert [r.router for r in rows] == ["smoe"]
    assert len(problems) == 1
    assert "line 2" in problems[0]
    assert "\n" not in problems[0]
    append_records(path, row("rmoe", 0, 1.6))  # going on after the kill must not lose the new row
    rows, problems = read_rows(path)
    assert [r.router for r in rows] == ["smoe", "rmoe"]
    assert len(problems) == 1


def test_two_corpora_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    append_records(path, row("smoe", 0, 1.7))
    append_records(path, row("rmoe", 0, 1.6, corpus_sha256="b" * 64))
    with pytest.raises(RequestError, match="one corpus in one comparison"):
        read_rows(path)


@pytest.mark.parametrize("version", [0, 3])
def test_another_schema_version_is_refused(tmp_path, version):
    path = tmp_path / "results.jsonl"
    append_records(path, row("smoe", 0, 1.7))
    append_records(path, msgspec.structs.replace(row("rmoe", 0, 1.6), schema_version=version))
    with pytest.raises(RequestError, match=f"line 2: schema_version is {version}; allowed: 1 to 2"):
        read_rows(path)


NOT_IN_VERSION_1 = (
    "test_context",
    "skipped_batches",
    "context",
    "seconds_per_1k_steps",
    "peak_mib",
    "folder",
    "model",
)
OLD = Path(__file__).with_name("version-1.jsonl")
"""Three lines of a results.jsonl written by version 1: finished and timed, with averaged weights, and failed."""


def test_rows_of_version_1_are_read_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(OLD.read_bytes())
    rows, problems = read_rows(path)
    assert problems == []
    old = [json.loads(line) for line in OLD.read_bytes().splitlines()]
    assert [one.key for one in rows] == ["smoe-seed0", "rmoe-seed0", "rmoe-seed1-learning_rate=0.01"]
    for one, line in zip(rows, old, strict=True):
        found = msgspec.to_builtins(one)
        assert all(found[name] == line.pop(name) for name in ("router", "seed", "sweep"))
        timing = line.pop("timing", None)  # the machine it was measured on is said since version 2
        assert found["timing"] == (timing and {**timing, "machine": None, "hardware": None, "begun": None})
        assert line.pop("schema_version") == 1
        if line.pop("status") == "failed":
            assert found["failure"] == {name: line[name] for name in found["failure"]}
            assert one.result is None
            continue
        assert one.failure is None
        assert line.pop("error") is None
        assert {name: found["result"][name] for name in line} == line
        rest = {name: value for name, value in found["result"].items() if name not in {*line, *found}}
        assert rest == dict.fromkeys(NOT_IN_VERSION_1)
    assert summarise(rows, preset="", baseline="smoe").routers[0].test is not None


def test_a_file_goes_on_in_the_new_version(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(OLD.read_bytes())
    old, _ = read_rows(path)
    append_records(path, changed(old[0], test=1.5))
    again, problems = read_rows(path)
    assert problems == []
    assert again == [changed(old[0], test=1.5), *old[1:]]
    assert [json.loads(line)["schema_version"] for line in path.read_bytes().splitlines()] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "change", [{"bpc": 1.0}, {"status": "gone"}, {"parameters": None}, {"val": "1.7"}, {"folder": "runs"}]
)
def test_a_line_of_version_1_that_is_no_row_is_passed_over(tmp_path, change):
    path = tmp_path / "results.jsonl"
    line = json.loads(OLD.read_bytes().splitlines()[0])
    path.write_bytes(msgspec.json.encode(line | change) + b"\n")
    rows, problems = read_rows(path)
    assert rows == []
    assert next(iter(change)) in problems[0]


def test_a_row_is_either_finished_or_failed():
    good, bad = row("smoe", 0, 1.7), row("smoe", 0, None, status="failed")
    for result, failure in ((good.result, bad.failure), (None, None)):
        with pytest.raises(ValueError, match="either a `result` or a `failure`"):
            msgspec.structs.replace(good, result=result, failure=failure)


def test_an_unknown_field_is_said(tmp_path):
    path = tmp_path / "results.jsonl"
    line = msgspec.json.decode(msgspec.json.encode(row("smoe", 0, 1.7)))
    path.write_bytes(msgspec.json.encode({**line, "bpc": 1.0}) + b"\n")
    rows, problems = read_rows(path)
    assert rows == []
    assert "bpc" in problems[0]


def test_schemas_statistics_and_report_import_no_torch():
    code = (
        "import sys, rmoe.results.rows, rmoe.compare.statistics, rmoe.compare.summary, rmoe.report.page;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
