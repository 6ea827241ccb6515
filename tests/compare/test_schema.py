"""results.jsonl: what is read back, what is refused, what is passed over."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from rmoe.errors import RequestError
from rmoe.results.comparison import append_row, read_rows
from tests.compare.rows import row


def test_round_trip(tmp_path):
    path = tmp_path / "results.jsonl"
    written = [row("smoe", 0, 1.7), row("rmoe", 0, 1.6)]
    for one in written:
        append_row(path, one)
    assert read_rows(path) == (written, [])


def test_a_later_line_of_the_same_run_stands(tmp_path):
    path = tmp_path / "results.jsonl"
    first = row("smoe", 0, 1.7, test=None)
    append_row(path, first)
    append_row(path, row("rmoe", 0, 1.6))
    append_row(path, msgspec.structs.replace(first, test=1.8))
    rows, _ = read_rows(path)
    assert [(r.router, r.test) for r in rows] == [("smoe", 1.8), ("rmoe", 2.0)]


def test_a_line_cut_short_is_said_and_the_rest_reported(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, row("smoe", 0, 1.7))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    rows, problems = read_rows(path)
    assert [r.router for r in rows] == ["smoe"]
    assert len(problems) == 1
    assert "line 2" in problems[0]
    assert "\n" not in problems[0]
    append_row(path, row("rmoe", 0, 1.6))  # going on after the kill must not lose the new row
    rows, problems = read_rows(path)
    assert [r.router for r in rows] == ["smoe", "rmoe"]
    assert len(problems) == 1


def test_two_corpora_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    append_row(path, row("smoe", 0, 1.7))
    append_row(path, row("rmoe", 0, 1.6, corpus_sha256="b" * 64))
    with pytest.raises(RequestError, match="one corpus in one comparison"):
        read_rows(path)


@pytest.mark.parametrize("version", [0, 2])
def test_another_schema_version_is_refused(tmp_path, version):
    path = tmp_path / "results.jsonl"
    append_row(path, row("smoe", 0, 1.7))
    append_row(path, msgspec.structs.replace(row("rmoe", 0, 1.6), schema_version=version))
    with pytest.raises(RequestError, match=f"line 2: schema_version is {version}; allowed: 1"):
        read_rows(path)


def test_an_unknown_field_is_said(tmp_path):
    path = tmp_path / "results.jsonl"
    line = msgspec.json.decode(msgspec.json.encode(row("smoe", 0, 1.7)))
    path.write_bytes(msgspec.json.encode({**line, "bpc": 1.0}) + b"\n")
    rows, problems = read_rows(path)
    assert rows == []
    assert "bpc" in problems[0]


def test_schemas_statistics_and_report_import_no_torch():
    code = (
        "import sys, rmoe.results.comparison, rmoe.compare.statistics, rmoe.compare.summary, rmoe.report.page;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
