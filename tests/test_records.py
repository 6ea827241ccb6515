"""Files are whole or not there: their bytes reach the disk before their name does, and a crash leaves the old file."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rmoe import records
from rmoe.records import Record, append_lines, atomic_write, durable_rename, write_record
from rmoe.report.page import written
from rmoe.results.analysis import Analysis, TextInfo, write_analysis
from rmoe.results.engine_traces import write_vllm
from rmoe.results.trace import Trace, TraceMeta, write_trace
from rmoe.training.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[1]


class Word(Record, frozen=True):
    word: str


def _truncated(path: Path) -> None:
    MetricsLog(path).append({"kind": "train", "step": 1})
    MetricsLog(path).truncate(1)


WRITERS: dict[str, Callable[[Path], object]] = {
    "record.json": lambda path: write_record(path, Word("new")),
    "metrics.jsonl": _truncated,
    "index.html": lambda path: written(path.parent, lambda plotly: "new", single_file=True),
}


@pytest.fixture
def happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every fsync and every rename below the folder, in order."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path.relative_to(tmp_path.resolve()).as_posix()))
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(("rename", target.relative_to(tmp_path).as_posix()))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads what a descriptor is of in /proc")
@pytest.mark.parametrize("name", WRITERS)
def test_bytes_then_name_then_folder(name: str, tmp_path: Path, happened: list[tuple[str, str]]) -> None:
    WRITERS[name](tmp_path / name)
    (_, staged), *_ = happened
    assert re.fullmatch(rf"{re.escape(name)}(\.[0-9a-f]{{8}})?\.part", staged)
    assert happened == [("sync", staged), ("rename", name), ("sync", ".")]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads what a descriptor is of in /proc")
def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, happened: list[tuple[str, str]]) -> None:
    (tmp_path / "staged" / "sub").mkdir(parents=True)
    (tmp_path / "staged" / "sub" / "file").write_text("new")
    durable_rename(tmp_path / "staged", tmp_path / "there")
    assert sorted(happened[:3]) == [("sync", "staged"), ("sync", "staged/sub"), ("sync", "staged/sub/file")]
    assert happened[3:] == [("rename", "there"), ("sync", ".")]
    (tmp_path / "staged").mkdir()
    with pytest.raises(OSError, match="not empty"):
        durable_rename(tmp_path / "staged", tmp_path / "there")
    assert (tmp_path / "there" / "sub" / "file").read_text() == "new"


@pytest.mark.parametrize("point", ["write", "sync", "rename"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    owner = {"write": (Path, "write_text"), "sync": (os, "fsync"), "rename": (Path, "rename")}[point]
    with monkeypatch.context() as patched:
        patched.setattr(*owner, full)
        with pytest.raises(OSError, match="No space"), atomic_write(target) as staged:
            staged.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("point", ["write", "os.fsync", "pathlib.Path.rename"])
def test_a_crash_leaves_the_old_file(point: str, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    script = (
        "import os, pathlib\n"
        "from rmoe.records import atomic_write\n"
        "die = lambda *_: os._exit(9)\n"
        f"{'' if point == 'write' else f'{point} = die'}\n"
        f"with atomic_write(pathlib.Path({str(target)!r})) as staged:\n"
        "    staged.write_text('new')\n"
        f"    {'die()' if point == 'write' else 'pass'}\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert target.read_text() == "old"
    with atomic_write(target) as staged:  # what the crash left beside it is in nobody's way
        staged.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


TEXT = TextInfo(name="t", sha256="", tokens=1)


def _trace(path: Path) -> None:
    meta = TraceMeta(model="m", source="rmoe", layer_names=["a"], num_experts=[2], experts_per_token=[1])
    trace = Trace(np.zeros((1, 1, 1), np.int16), None, np.array([1]), meta)
    (write_trace if path.suffix == ".safetensors" else write_vllm)(path, trace)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("analysis.json", lambda path: write_analysis(path, Analysis(text=TEXT, models=[]))),
        ("index.html", lambda path: written(path.parent, lambda plotly: "new", single_file=True)),
        ("plotly.min.js", lambda path: written(path.parent, lambda plotly: "new", single_file=False)),
        ("t.safetensors", _trace),
        ("t.jsonl", _trace),
    ],
)
def test_what_no_lock_guards_is_whole_when_two_write_it(
    name: str, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writes all of it while the first is about to give its own the name."""
    real, nested = durable_rename, list[str]()

    def other_writes_first(staged: Path, target: Path) -> None:
        if target.name == name and not nested:
            nested.append(name)
            write(tmp_path / name)
        real(staged, target)

    monkeypatch.setattr(records, "durable_rename", other_writes_first)
    write(tmp_path / name)
    assert nested
    assert {path.name for path in tmp_path.iterdir()} <= {name, "index.html", "plotly.min.js"}


def test_a_cut_line_is_closed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_lines(path, b"one\n")
    with path.open("ab") as file:
        file.write(b"tw")
    append_lines(path, b"three\nfour\n")
    assert path.read_bytes() == b"one\ntw\nthree\nfour\n"


@pytest.mark.parametrize(
    "write",
    [
        lambda path, length: append_lines(path, b"x" * length + b"\n"),
        lambda path, length: MetricsLog(path).append({"word": "x" * length}),
    ],
    ids=["append_lines", "metrics"],
)
def test_a_disk_that_fills_up_within_a_line_is_an_error(
    write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """A limit on the size of files cuts a write as a full disk does."""
    path, before = tmp_path / "lines", resource.getrlimit(resource.RLIMIT_FSIZE)
    write(path, 10)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    write(path, 9)
    assert [len(line) for line in path.read_text().replace('{"word":"', "").replace('"}', "").split()] == [
        10,
        9,
    ]


def test_nothing_else_syncs_or_replaces_files() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("rmoe", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if any(call in path.read_text() for call in ("os.fsync(", "os.replace(", "os.rename("))
    }
    assert found == {Path(records.__file__).relative_to(ROOT).as_posix()}
