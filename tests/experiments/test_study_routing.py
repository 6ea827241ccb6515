"""Routing figures of finished runs: measured once, and paired in the table."""

from __future__ import annotations

import math

import msgspec

from experiments.figures import Finished, figures_of
from experiments.lines import read_rows
from experiments.study_routing import SHOWN, RoutingRow, measure_runs, routing_section
from experiments.study_rows import study_row
from rmoe.results.run import Versions
from rmoe.training.run import train
from tests.experiments.small import small_study, write_text

VERSIONS = Versions(code="none", python="3", libraries={})


def write(path, *rows: tuple[str, str, int, float]) -> None:
    lines = [
        msgspec.json.encode(
            RoutingRow(grid=grid, router=router, seed=seed, figures={"entropy": value}, versions=VERSIONS)
        )
        for grid, router, seed, value in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")


def at(grid: str) -> str:
    return grid if grid.startswith("depth-") else "std-1"


def test_a_finished_run_is_measured_once(tmp_path):
    plan = small_study(["smoe"], layers=2)
    config = plan.config(plan.grids[0], write_text(tmp_path)).with_setting("router", "smoe")
    folder = tmp_path / "out" / "std-1" / "runs" / "smoe-seed0"
    row = study_row("std-1", train(config, folder, progress=False))
    results = tmp_path / "routing.jsonl"
    asked = ([row], tmp_path, "text.txt", tmp_path / "out", results)
    assert measure_runs(*asked) == 1
    assert measure_runs(*asked) == 0
    (found,) = read_rows(results, RoutingRow)
    assert found.key == ("std-1", "smoe", 0)
    assert set(SHOWN) <= found.figures.keys()
    assert found.figures == figures_of(Finished(folder, config, tmp_path, {}, ""), ["routing"])


def test_a_grids_own_baseline_comes_first(tmp_path):
    """As the paper starts them, RMoE stands beside SMoE as it starts that; and that SMoE beside the reference's."""
    path = tmp_path / "routing.jsonl"
    write(
        path, ("std-1", "smoe", 0, 2.0), ("as-they-stand", "smoe", 0, 2.5), ("as-they-stand", "rmoe", 0, 2.75)
    )
    lines = routing_section([], path, "smoe", at).splitlines()
    found = {
        line.split("|")[2].strip(): line.split("|")[6].strip() for line in lines if line.startswith("| as")
    }
    assert found == {"`smoe`": "+0.5", "`rmoe`": "+0.25"}


def test_figures_are_paired_with_the_baseline_of_their_scale_and_depth(tmp_path):
    path = tmp_path / "routing.jsonl"
    write(
        path,
        ("std-1", "smoe", 0, 2.0), ("std-1", "smoe", 1, 2.1), ("std-1", "rmoe", 0, 2.5), ("std-1", "rmoe", 1, 2.4),
        ("as-they-stand", "rmoe", 1, 3.1), ("std-1", "rmoe", 7, 9.0),
        ("depth-6", "smoe", 0, 1.0), ("depth-6", "rmoe", 0, 1.25), ("depth-24", "rmoe", 0, 1.0),
    )  # fmt: skip
    lines = routing_section([], path, "smoe", at).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[3:8] for line in lines if line.startswith("| ")}
    assert cells["as-they-stand"] == [" 1 ", "  ", "  ", " +1 ", "  "]
    assert cells["depth-6"] == [" 1 ", "  ", "  ", " +0.25 ", "  "]
    # Pairs +0.5 and +0.3: standard error 0.1, and the t of one degree of freedom is 12.706.
    low, high = 0.4 - 12.706 * 0.1, 0.4 + 12.706 * 0.1
    assert cells["std-1"][3] == f" +0.4 ({low:+.3g} to {high:+.3g}) "
    assert "depth-24" not in cells
    assert math.isclose(low, -0.8706)


def test_no_figures_no_section(tmp_path):
    assert routing_section([], tmp_path / "none.jsonl", "smoe", at) == ""
    write(tmp_path / "alone.jsonl", ("std-1", "smoe", 0, 2.0))
    assert routing_section([], tmp_path / "alone.jsonl", "smoe", at) == ""


def test_a_run_counts_with_what_it_measured_itself(tmp_path):
    """Its own gate entropy goes before the one measured later, and needs no later measurement."""
    plan = small_study(["smoe"], layers=2)
    config = plan.config(plan.grids[0], write_text(tmp_path)).with_setting("router", "smoe")
    row = study_row("std-1", train(config, tmp_path / "run", progress=False))
    replace = msgspec.structs.replace
    rows = [
        replace(row, router=router, seed=seed, entropy_nats=[value, value + 1.0])
        for router, seed, value in (("smoe", 0, 1.0), ("rmoe", 0, 1.25), ("smoe", 1, 1.0), ("rmoe", 1, 1.75))
    ]
    path = tmp_path / "routing.jsonl"
    write(path, ("std-1", "smoe", 0, 7.0), ("std-1", "rmoe", 0, 5.0))
    (line,) = [line for line in routing_section(rows, path, "smoe", at).splitlines() if "`rmoe`" in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "2"
    assert cells[6].startswith("+0.5 (")
    assert cells[7].startswith("+0 (")
