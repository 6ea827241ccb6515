"""Files as people have them: the same rows in every format and encoding, folders of links, lines of any length."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rmoe.data.rows import read_lines
from rmoe.data.tasks import Conversation, Instruction, Labelled, Message, MultipleChoice, read_tasks
from rmoe.data.text import folder_text, open_text, read_documents
from rmoe.errors import RequestError

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add é\n 1, 2.", "input": None, "output": 'the "sum"', "id": 1},
    {"instruction": "Say it", "input": "part", "output": "yes", "id": 2},
]
READ = [
    Instruction(instruction="Add é\n 1, 2.", output='the "sum"'),
    Instruction(instruction="Say it", output="yes", input="part"),
]


def lines(end: str = "\n") -> str:
    return end.join(json.dumps(row, ensure_ascii=False) for row in ROWS) + end


def table(mark: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ROWS[0], delimiter=mark)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


# what is odd -> the file's name and bytes
FORMS: dict[str, tuple[str, bytes]] = {
    "json lines": ("a.jsonl", lines().encode()),
    "without the last line's end": ("a.jsonl", lines().rstrip().encode()),
    "a byte order mark": ("a.jsonl", lines().encode("utf-8-sig")),
    "Windows": ("a.jsonl", lines("\r\n").encode("utf-8-sig")),
    "Notepad's Unicode": ("a.jsonl", lines("\r\n").encode("utf-16")),
    "UTF-16, other end first": ("a.jsonl", b"\xfe\xff" + lines().encode("utf-16-be")),
    "UTF-16 without a mark": ("a.jsonl", lines().encode("utf-16-le")),
    "UTF-32": ("a.jsonl", lines().encode("utf-32")),
    "packed": ("a.jsonl.gz", gzip.compress(lines().encode("utf-8-sig"))),
    "another suffix": ("a.ndjson", lines().encode()),
    "no suffix": ("a", lines().encode()),
    "blank lines": ("a.jsonl", b"\n\r\n" + lines("\n \n").encode()),
    "an array": ("a.json", json.dumps(ROWS).encode()),
    "an array in .jsonl": ("a.jsonl", json.dumps(ROWS).encode()),
    "an array over lines": ("a.json", json.dumps(ROWS, indent=2).encode("utf-8-sig")),
    "an array of lines": ("a.json", b"[\n" + ",\n".join(json.dumps(row) for row in ROWS).encode() + b"\n]\n"),
    "a packed array": ("a.json.gz", gzip.compress(json.dumps(ROWS).encode("utf-16"))),
    "csv": ("a.csv", table().encode()),
    "Excel's csv": ("a.csv", table().encode("utf-8-sig")),
    "Excel's csv in Europe": ("a.csv", table(";").encode("utf-8-sig")),
    "Excel's Unicode text": ("a.tsv", table("\t").encode("utf-16")),
    "packed csv": ("a.csv.gz", gzip.compress(table().encode())),
}


@pytest.mark.parametrize(("name", "data"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert read_tasks(path, Instruction) == READ
    assert list(read_documents(path, "output")) == [row["output"].encode() for row in ROWS]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a"])
def test_parquet(tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path / name, ROWS)
    assert read_tasks(path, Instruction) == READ
    assert list(read_documents(path, "output")) == [row["output"].encode() for row in ROWS]
    labelled = write_parquet(tmp_path / "b.parquet", [{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    assert read_tasks(labelled, Labelled) == [Labelled(text="x", label=1), Labelled(text="y", label=0)]


def test_parquet_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"a\.parquet is .*pip install 'rmoe\[data\]'"):
        read_tasks(tmp_path / "a.parquet", Instruction)


def test_numbers_and_lists_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nfine,1\n7,0\nodd,007\n")
    read = [Labelled(text="fine", label=1), Labelled(text="7", label=0), Labelled(text="odd", label="007")]
    assert read_tasks(tmp_path / "a.csv", Labelled) == read
    (tmp_path / "b.csv").write_text('question,choices,label\nWhich?,"[""a"", ""b""]",1\n')
    assert read_tasks(tmp_path / "b.csv", MultipleChoice) == [
        MultipleChoice(question="Which?", choices=["a", "b"], label=1)
    ]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": "2", "refusal": None, "tool_calls": None},
    {"role": "user", "content": "never answered"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "One?"},
    {"from": "gpt", "value": "1"},
    {"from": "human", "value": "Two\n?"},
    {"from": "gpt", "value": "2"},
]
MESSAGES = (
    Message("system", "Be brief."),
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two\n?"),
    Message("assistant", "2"),
)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": TURNS, "instruction": None, "output": None},
        {"conversations": SHAREGPT, "id": "x"},
        {"conversations": TURNS},
    ],
)
def test_conversations(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]))
    read = Conversation(instruction="One?", output="2", messages=MESSAGES)
    assert read_tasks(path, Instruction) == [read]
    if row.get("conversations") is SHAREGPT:  # parquet has one type a column
        assert read_tasks(write_parquet(tmp_path / "a.parquet", [row]), Instruction) == [read]


def test_an_answer_of_weight_zero_is_not_learned(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    more = [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": more}))
    (read,) = read_tasks(tmp_path / "a.jsonl", Instruction)
    assert isinstance(read, Conversation)
    assert [message.learned for message in read.messages] == [True, False, True, True]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(RequestError, match="no answer to learn"):
        read_tasks(tmp_path / "b.jsonl", Instruction)


# what is wrong -> the file's name, its bytes, the error's field, what it says
WRONG: dict[str, tuple[str, bytes, str, str]] = {
    "an array cut short": ("a.json", b'[{"instruction": "a", "output": "b"}, {"inst', "a.json", "truncated"),
    "an item of an array": (
        "a.json",
        b'[{"instruction": "a", "output": "b"}, 5]',
        "a.json item 2",
        "got `int`",
    ),
    "an empty array": ("a.json", b"[]", "PATH", "empty"),
    "required and null": ("a.jsonl", b'{"instruction": "a", "output": null}', "a.jsonl line 1", "$.output"),
    "too many cells": ("a.csv", b"instruction,output\na,b,c\n", "a.csv line 2", "3 cells under 2 columns"),
    "after blank lines": (
        "a.csv",
        b"\n\r\n\ninstruction,output\na,b\n\na,b,c\n",
        "a.csv line 7",
        "3 cells under 2 columns",
    ),
    "a quote not closed after a blank line": (
        "a.csv",
        b'\ninstruction,output\na,"b\n',
        "a.csv line 3",
        "unexpected end of data",
    ),
    "a quote not closed": ("a.csv", b'instruction,output\na,"b\n', "a.csv line 2", "unexpected end of data"),
    "csv in Latin-1": ("a.csv", b"instruction,output\na,\xe9\n", "a.csv line 2", "not UTF-8 (byte 0xe9)"),
    "csv without a column": ("a.csv", b"instruction,answer\na,b\n", "a.csv line 2", "field `output`"),
    "UTF-16 cut short": ("a.jsonl", lines().encode("utf-16")[:-1], "a.jsonl", "UTF-16 that is damaged"),
    "no parquet": ("a.parquet", b"text", "a.parquet", "a whole parquet file"),
    "parquet by its first bytes": ("a.bin", b"PAR1....", "a.bin", "a whole parquet file"),
    "no such role": (
        "a.jsonl",
        b'{"messages": [{"role": "bot", "content": "a"}]}',
        "a.jsonl line 1",
        "role 'bot'",
    ),
    "a list of roles": (
        "a.jsonl",
        b'{"messages": [{"role": ["user"], "content": "a"}]}',
        "a.jsonl line 1",
        "role ['user'], not one of",
    ),
    "no answer": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "a.jsonl line 1",
        "no answer",
    ),
    "an empty answer": (
        "a.jsonl",
        b'{"conversations": [{"from": "gpt", "value": " "}]}',
        "a.jsonl line 1",
        "an empty answer - at `$.conversations[0].value`",
    ),
    "a call of a tool": (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]}',
        "a.jsonl line 1",
        "`tool_calls`, which is not read - at `$.messages[0]`",
    ),
    "no turns": ("a.jsonl", b'{"messages": "a"}', "a.jsonl line 1", "Expected `array`, got `str`"),
}


@pytest.mark.parametrize(("name", "data", "field", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, data: bytes, field: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(RequestError) as caught:
        read_tasks(path, Instruction)
    assert caught.value.field == (str(path) if field == "PATH" else field)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_text_that_is_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some words\n" * 9, encoding=encoding)
    with pytest.raises(RequestError, match=r"begins as UTF-(16|32): iconv"):
        list(open_text(str(path), "text").read())
    path.write_text("some words\n", encoding="utf-8-sig")  # a text is taken byte for byte
    assert b"".join(open_text(str(path), "text").read()) == path.read_bytes()


def test_a_very_long_line_takes_linear_time() -> None:
    """16,384 pieces of one line: to join them anew with each piece would copy 64 GiB."""
    begun = time.process_time()
    ((number, line),) = read_lines((b"x" * 512 for _ in range(16_384)), "a")
    assert time.process_time() - begun < 2
    assert (number, len(line)) == (1, 512 * 16_384)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_line_longer_than_any_buffer(tmp_path: Path, name: str) -> None:
    text = "x" * 3_000_000
    rows = {"a.jsonl": json.dumps({"text": text}), "a.csv": f"text\n{text}\n"}
    (tmp_path / name).write_text(rows.get(name, json.dumps([{"text": text}])))
    assert list(read_documents(tmp_path / name, "text")) == [text.encode()]


def text_of(folder: Path) -> bytes:
    return b"".join(folder_text("x", folder, "text").read())


def test_a_folder_of_links_is_the_text_of_its_files(tmp_path: Path) -> None:
    """The Hub's cache: `snapshots/<revision>/` holds links to `blobs/`, whose names have no suffix."""
    plain, hub = tmp_path / "plain", tmp_path / "models--a--b"
    snapshot = hub / "snapshots" / "1f"
    for folder in (plain / "data", hub / "blobs", snapshot / "data"):
        folder.mkdir(parents=True)
    for number, text in enumerate(["one\n", "two\n", "two\n"]):
        name = f"data/{number}.txt"
        (plain / name).write_text(text)
        blob = hub / "blobs" / text.strip()
        blob.write_text(text)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob.name)
    assert text_of(snapshot) == text_of(plain)
    assert text_of(hub).count(b"two") == 2
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "link").symlink_to(plain / "data")  # a link to a folder elsewhere
    (outside / "self").symlink_to(outside)
    (plain / "data" / "up").symlink_to(tmp_path)
    assert sorted(text_of(outside).split(b"\n\n\f\n")) == [b"one\n", b"two\n", b"two\n"]
    (tmp_path / "whole").symlink_to(plain)
    assert text_of(tmp_path / "whole") == text_of(plain)


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    (tmp_path / ".c.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(RequestError, match=r"b\.txt'; allowed: a link that leads to a file"):
        text_of(tmp_path)


def test_a_file_in_a_linked_folder_counts_once(tmp_path: Path) -> None:
    """`latest` beside the version it is; a folder and the one that holds it."""
    text, links = tmp_path / "d" / "v1", tmp_path / "links"
    text.mkdir(parents=True)
    links.mkdir()
    for name in ("a", "b"):
        (text / f"{name}.txt").write_text(name)
    for name, target in (("v1", text), ("latest", text), ("all", text.parent)):
        (links / name).symlink_to(target)
    assert sorted(text_of(links).split(b"\n\n\f\n")) == [b"a", b"b"]
    (tmp_path / "both").symlink_to(links)
    assert text_of(tmp_path / "both") == text_of(links)


@pytest.mark.parametrize("name", ["b1.txt", "z1.txt"])
def test_a_linked_file_counts_once_whatever_its_name(name: str, tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "ext"
    text.mkdir()
    other.mkdir()
    (text / "a.txt").write_text("a")
    (other / "b.txt").write_text("b")
    (text / "l1").symlink_to(other)
    (text / name).symlink_to(other / "b.txt")
    os.mkfifo(text / "pipe.txt")  # read, it would wait for ever
    assert sorted(text_of(text).split(b"\n\n\f\n")) == [b"a", b"b"]


def test_the_documents_of_a_folder_have_no_byte_order_mark(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8-sig")
    assert sorted(text_of(tmp_path).split(b"\n\n\f\n")) == [b"a", b"b"]


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert text_of(tmp_path) == b"a"
    (tmp_path / "b.txt").symlink_to(tmp_path / "b.txt")
    with pytest.raises(RequestError, match=r"b\.txt'; allowed: a link that leads to a file"):
        text_of(tmp_path)


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "dataset_info.json").write_text("{}")  # no text of the folder
    assert text_of(tmp_path) == b"one\n\n\f\ntwo"


def test_a_home_and_commas_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b=c.jsonl").write_text(lines())
    assert read_tasks(Path("~/a,b=c.jsonl"), Instruction) == READ
    assert b"".join(open_text("~/a,b=c.jsonl", "output").read()).startswith(b'the "sum"')
