"""`rmoe runs` of grids: queued, running elsewhere, lost; through links; watched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rmoe.cli.main import main
from rmoe.compare.engines import listing
from rmoe.compare.engines.journal import JOURNAL, Entry, note, read_journal
from rmoe.compare.engines.listing import grid_runs
from rmoe.compare.plan import COMPARISON, ComparisonRecord
from rmoe.records import append_records, write_record
from rmoe.training.config import RunConfig
from rmoe.training.run import train
from rmoe.training.run_folder import locked
from tests.training import tiny

HERE, GONE = f"{os.getpid()} {os.uname().nodename}", f"4194303 {os.uname().nodename}"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    train(tiny.config(tiny.text(folder)), folder / "run", progress=False)
    return folder / "run"


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    out = tmp_path / "grid"
    out.mkdir()
    record = ComparisonRecord(config=RunConfig().to_dict(), sweep={}, changes={}, data_sha256="")
    write_record(out / COMPARISON, record)
    return out


def entry(grid: Path, name: str, state: str = "queued", engine: str = "local", **more: object) -> None:
    line = Entry(name=name, state=state, engine=engine, at=1.0, **{"driver": HERE, **more})
    (grid / JOURNAL).parent.mkdir(exist_ok=True)
    append_records(grid / JOURNAL, line)


def states(grid: Path) -> dict[str, str]:
    return {Path(run.folder).name: run.state for run in grid_runs(grid.parent)}


def test_queued_while_somebody_waits_and_lost_without(grid, monkeypatch):
    entry(grid, "rmoe-seed0")
    entry(grid, "smoe-seed7-learning_rate=0.01", driver=GONE)
    entry(grid, "unit-0")
    entry(grid, "a-seed1", engine="slurm", id="7_1")
    entry(grid, "b-seed1", engine="slurm", id="7_2", driver=GONE)
    monkeypatch.setattr(listing, "slurm_queue", lambda: frozenset({"7_2"}))
    assert states(grid) == {
        "rmoe-seed0": "queued",
        "smoe-seed7-learning_rate=0.01": "lost",
        "a-seed1": "lost",
        "b-seed1": "queued",
    }
    run = next(run for run in grid_runs(grid) if run.seed == 7)
    assert (run.router, run.steps) == ("smoe", RunConfig().training.max_steps)


def test_begun_runs_of_this_machine_and_of_others(grid, one):
    for name, holder in (
        ("a-seed0", None),
        ("b-seed0", "process 5 on far"),
        ("c-seed0", None),
        ("d-seed0", None),
    ):
        folder = grid / "runs" / name
        shutil.copytree(one, folder)
        entry(grid, name, driver=GONE if name == "c-seed0" else HERE)
        if name != "d-seed0":
            (folder / "result.json").unlink()
        if holder:
            (folder / "run.lock").write_text(f"{holder}\n")
    expected = {"a-seed0": "queued", "b-seed0": "running", "c-seed0": "lost", "d-seed0": "finished"}
    assert states(grid) == expected
    with locked(grid / "runs" / "a-seed0"):
        assert states(grid)["a-seed0"] == "running"
    old = grid / "runs" / "b-seed0" / "metrics.jsonl"
    os.utime(old, (1, 1))  # nothing was heard of it for long
    assert states(grid)["b-seed0"] == "queued"


def test_through_links_each_run_once(grid, one, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(one, elsewhere / "run")
    (grid / "linked").symlink_to(elsewhere)
    (grid / "again").symlink_to(elsewhere)
    (grid / "loop").symlink_to(grid)
    assert main(["runs", str(grid)]) == 0
    assert capsys.readouterr().out.count("finished") == 1


def test_watch_ends_when_nothing_is_left_to_wait_for(grid, monkeypatch, capsys):
    entry(grid, "rmoe-seed0")
    monkeypatch.setattr("rmoe.cli.runs.SECONDS_BETWEEN", 0.0)
    looks = iter([lambda: None, lambda: None, lambda: entry(grid, "rmoe-seed0", "failed")])
    real = listing.grid_runs

    def look(root: Path) -> list:
        next(looks)()
        return real(root)

    monkeypatch.setattr(listing, "grid_runs", look)
    assert main(["runs", str(grid), "--watch"]) == 0
    assert next(looks, None) is None
    assert "state" in capsys.readouterr().out
    assert main(["runs", str(grid), "--watch", "--json"]) == 2


def test_a_cut_line_of_the_journal_is_passed_over(grid):
    note(grid, "a-seed0", "queued", "ray")
    with (grid / JOURNAL).open("ab") as file:
        file.write(b'{"name": "a-s')
    note(grid, "a-seed0", "answered", "ray")
    assert read_journal(grid)["a-seed0"].state == "answered"


def test_a_finished_branch_is_listed_once_where_it_is(grid, one):
    shutil.copytree(one, grid / "branches" / "rmoe-seed0-training.max_steps=2")
    entry(grid, "rmoe-seed0-training.max_steps=2", state="answered")
    (run,) = grid_runs(grid)
    assert (Path(run.folder).parent.name, run.state) == ("branches", "finished")
