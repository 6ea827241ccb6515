"""`rmoe probe` and `rmoe.probes.run`: what is written, resumed and refused; a stranger's router gets its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmoe.cli.main import main
from rmoe.compare.engines.engine import Answer
from rmoe.compare.engines.local import LocalEngine
from rmoe.compare.probes import summarise
from rmoe.errors import RequestError, RunError
from rmoe.probes import Knobs, read_rows, run
from rmoe.records import read_record
from rmoe.results.probes import MEAN, SUMMARY_VERSION, Summary
from rmoe.routing.zoo import ZOO
from rmoe.training.run_folder import locked

TINY = (
    "--knob",
    "steps=4",
    "--knob",
    "tokens=16",
    "--knob",
    "layers=2",
    "--knob",
    "experts=4",
    "--jobs",
    "1",
)
FEW = Knobs(steps=4, tokens=16, layers=2, experts=4)

STRANGER = """
import torch
from torch import nn
from rmoe.routing import ZooRow, register, resolve, vary
from rmoe.routing.initial import constant
from rmoe.routing.scorer import Linear

class Scaled(Linear):
    class Config(Linear.Config):
        kind = "scaled_linear"
        start: float = 3.0
    def __init__(self, options, geometry, features):
        super().__init__(options, geometry, features)
        self.scale = nn.Parameter(torch.empty(()))
    def initializers(self):
        return {"scale": constant(self.options.start)}
    def forward(self, features, shared, noise):
        return self.scale * super().forward(features, shared, noise)

register("stranger", ZooRow(vary(resolve("smoe"), scorer=Scaled.Config()), "elsewhere", "scores times a learned scale"))
"""


def test_a_strangers_router_gets_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of under 30 lines, one command, nothing of the package touched."""
    monkeypatch.setitem(ZOO, "stranger", ZOO["smoe"])  # so that the plugin's row goes again with the test
    monkeypatch.delitem(ZOO, "stranger")
    plugin = tmp_path / "stranger.py"
    plugin.write_text(STRANGER)
    assert len(STRANGER.splitlines()) < 30
    out = tmp_path / "out"
    arguments = ["probe", "--routers", "smoe,stranger", "--probes", "lookup,carry", "--seeds", "2"]
    assert main([*arguments, "--plugin", str(plugin), "--out", str(out), *TINY]) == 0
    shown = capsys.readouterr().out
    assert "stranger" in shown
    summary = read_record(out / "summary.json", Summary, SUMMARY_VERSION)
    card = next(card for card in summary.cards if card.router == "stranger")
    assert set(card.scores) == {"lookup", "carry", MEAN}
    assert card.note == ""  # stacked
    page = (out / "report" / "index.html").read_text()
    assert "stranger" in page
    assert (out / "summary.md").read_text().count("`stranger`") == 1


def test_resumes_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmoe.probes import runner

    units: list[runner.ProbeUnit] = []
    real = runner.ProbeUnit.carry_out
    monkeypatch.setattr(runner.ProbeUnit, "carry_out", lambda unit: units.append(unit) or real(unit))
    first = run(["smoe"], ["lookup"], 2, tmp_path, knobs=FEW)
    assert [unit.lanes for unit in units] == [[("lookup", 0), ("lookup", 1)]]
    results = tmp_path / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-40])  # a kill in the middle of the last line
    again = run(["smoe"], ["lookup"], 3, tmp_path, knobs=FEW)
    assert [unit.lanes for unit in units[1:]] == [[("lookup", 1), ("lookup", 2)]]
    assert [row.regret for row in again[:2]] == pytest.approx([row.regret for row in first], abs=1e-5)
    rows, problems = read_rows(results)
    assert len(rows) == 3
    assert len(problems) == 1
    run(["smoe"], ["lookup"], 3, tmp_path, knobs=FEW)
    assert len(units) == 2


def test_same_seed_same_numbers_whatever_is_trained_beside() -> None:
    alone = run(["rmoe"], ["carry"], [3], knobs=FEW)[0]
    beside = run(["smoe", "rmoe"], ["lookup", "carry"], [0, 3], knobs=FEW)
    other = next(row for row in beside if (row.router, row.probe, row.seed) == ("rmoe", "carry", 3))
    assert other.loss == pytest.approx(alone.loss, abs=1e-5)
    assert run(["rmoe"], ["carry"], [3], knobs=FEW)[0].loss == alone.loss


@pytest.mark.slow
def test_processes_give_the_same_rows(tmp_path: Path) -> None:
    arguments = ["probe", "--routers", "smoe", "--probes", "lookup", "--seeds", "1", "--sweep", "noise=0.5,1"]
    for jobs in ("1", "2"):
        assert main([*arguments, *TINY, "--jobs", jobs, "--out", str(tmp_path / jobs)]) == 0
    one, two = (
        {row.key: row.loss for row in read_rows(tmp_path / jobs / "results.jsonl")[0]} for jobs in "12"
    )
    assert len(one) == 2
    assert one == two
    assert (tmp_path / "2" / "logs" / "worker-1.log").exists()
    assert not (tmp_path / "1" / "logs").exists()


def test_sweep_and_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "probe",
        "--routers",
        "rmoe",
        "--probes",
        "integrate",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
        *TINY,
    ]
    assert main([*arguments, "--sweep", "noise=0.5,2", "--router-option", "recurrence.width=7"]) == 0
    assert "no verdict" in capsys.readouterr().out
    summary = read_record(tmp_path / "summary.json", Summary, SUMMARY_VERSION)
    assert [point.value for point in summary.points] == [0.5, 2.0]
    assert summary.cards[0].scores["integrate"].interval is None
    rows, _ = read_rows(tmp_path / "results.jsonl")
    assert {row.router_spec["recurrence"]["width"] for row in rows} == {7}
    assert '"sweep"' in (tmp_path / "report" / "index.html").read_text()


def test_a_unit_has_one_name_whatever_else_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Slurm finds the job of an earlier call by its name."""
    asked: list[dict[str, Any]] = []

    class Lost(LocalEngine):
        def answers(self, jobs: Any, wants: Any) -> Any:
            asked.append(dict(jobs))
            for name, job in list(jobs.items())[: 1 if len(asked) == 1 else None]:
                yield name, Answer(value=job.carry_out())
            if len(asked) == 1:
                yield "", Answer(error="lost")

    monkeypatch.setattr("rmoe.compare.engines.engine_of", lambda *_, **__: Lost([[]], 1, tmp_path / "logs"))
    arguments = [
        "probe",
        "--routers",
        "smoe",
        "--probes",
        "lookup,carry",
        "--seeds",
        "1",
        *TINY[:-2],
        "--jobs",
        "2",
    ]
    arguments += ["--sweep", "noise=0.5,1,2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    said = f"error: lost; saved: what finished before, in {tmp_path / 'out'}; to go on: run the same"
    assert said in capsys.readouterr().err
    assert main(arguments) == 0
    first, second = asked
    assert len(second) == len(first) - 1
    assert all(first[name] == unit for name, unit in second.items())


def test_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "probe",
        "--routers",
        "smoe",
        "--probes",
        "lookup",
        "--seeds",
        "1",
        *TINY,
        "--out",
        str(tmp_path),
    ]
    with locked(tmp_path):
        assert main(arguments) == 2
    assert "a folder no other run is writing to" in capsys.readouterr().err
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--probes", "looku"], "--probes is 'looku'"),
        (["--probes", ","], "--probes is ''"),
        (["--routers", "nosuch"], "router is 'nosuch'"),
        (["--knob", "colour=3"], "knob is 'colour'"),
        (["--knob", "noise"], "--knob is 'noise'"),
        (["--knob", "noise=loud"], "noise is 'loud'"),
        (["--knob", "noise=-1"], "noise is '-1'"),
        (["--knob", "layers=1"], "layers is '1'"),
        (["--knob", "top_k=9"], "top_k is 9; allowed: 1 to experts (8)"),
        (["--knob", "experts=32", "--knob", "top_k=8"], "experts is 32"),
        (["--sweep", "noise"], "--sweep is 'noise'"),
        (["--sweep", "noise=null,0.5"], "--sweep is 'noise=null,0.5'; allowed: numbers"),
        (["--sweep", "noise=1,2", "--sweep", "width=8"], "--sweep is"),
        (["--sweep", "width=8,16", "--router-option", "recurrence.normalize=true"], "--sweep is 'width'"),
        (["--router-option", "gate.nosuch=1"], "--router-option is"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0; allowed: 1 or more"),
        (["--jobs", "-2"], "--jobs is -2; allowed: 1 or more"),
        (["--margin", "nan"], "--margin is nan; allowed: 0 or more, and finite"),
        (["--margin", "-1"], "--margin is -1.0"),
        (["--out", __file__], "allowed: a folder that can be written"),
        (["--baseline", "rmoe"], "--baseline is 'rmoe'"),
        (["--plugin", "nosuch.py"], "--plugin is 'nosuch.py'"),
        (["--routers", "deepseek-v3-groups", "--knob", "experts=6"], "gate.groups is 4"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [*arguments] if "--routers" in arguments else ["--routers", "smoe", *arguments]
    out = tmp_path / "out"
    assert main(["probe", "--out", str(out), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not out.exists()


@pytest.mark.parametrize(
    "files", [["comparison.json"], ["comparison.json", "results.jsonl"], ["config.json"], ["analysis.json"]]
)
def test_a_folder_of_something_else_is_left_alone(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert main(["probe", "--routers", "smoe", "--out", str(tmp_path)]) == 2
    assert "allowed: a new or empty folder, or one of earlier probes" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_the_lock_is_held_until_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder of a call that was killed before its first results is gone on with; unreadable lines are said."""
    from rmoe.report.probes import page

    tried: list[bool] = []
    real = page.write_page

    def checked(*given: Any) -> Path:
        with pytest.raises(RequestError, match="a folder no other run is writing to"), locked(tmp_path):
            pass
        tried.append(True)
        return real(*given)

    monkeypatch.setattr(page, "write_page", checked)
    (tmp_path / "logs").mkdir()
    (tmp_path / "engine").mkdir()
    arguments = ["probe", "--routers", "smoe", "--probes", "lookup", "--seeds", "1", "--out", str(tmp_path)]
    assert main([*arguments, *TINY]) == 0
    assert tried == [True]
    with locked(tmp_path):
        pass


def test_lines_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    run(["smoe"], ["lookup"], 1, tmp_path, knobs=FEW)
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b"{half\n")
    said: list[str] = []
    run(["smoe"], ["lookup"], 1, tmp_path, knobs=FEW, progress=said.append)
    assert len(said) == 1
    assert said[0].startswith("note: results.jsonl line 2 cannot be read and is skipped")


def test_single_file_needs_a_folder(capsys: pytest.CaptureFixture) -> None:
    assert main(["probe", "--routers", "smoe", "--single-file"]) == 2
    assert capsys.readouterr().err == "error: --single-file is True; allowed: unset without --out\n"


def test_results_of_a_plugin_that_has_changed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files stand for one that was edited; the package's own routers are not the plugin's."""
    monkeypatch.setitem(ZOO, "stranger", ZOO["smoe"])
    monkeypatch.delitem(ZOO, "stranger")
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    row = 'register("stranger", ZooRow(resolve("smoe"), "elsewhere", "it"))'
    lines = ["from rmoe.routing import register, resolve", "from rmoe.routing.zoo import ZooRow", row]
    before.write_text("\n".join(lines))
    after.write_text("\n".join([*lines, "# edited"]))
    out = tmp_path / "out"
    first = run(["smoe", "stranger"], ["lookup"], 1, out, knobs=FEW, plugins=[str(before)])
    assert run(["smoe", "stranger"], ["lookup"], 1, out, knobs=FEW, plugins=[str(before)]) == first
    assert run(["smoe"], ["lookup"], 1, out, knobs=FEW, plugins=[str(after)]) == first[:1]
    with pytest.raises(
        RequestError, match=r"stranger is 'of a plugin that has changed'; allowed: the plugin as"
    ):
        run(["smoe", "stranger"], ["lookup"], 1, out, knobs=FEW, plugins=[str(after)])


@pytest.mark.parametrize("change", ["version", "spec"])
def test_results_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    run(["smoe"], ["lookup"], 1, tmp_path, knobs=FEW)
    path = tmp_path / "results.jsonl"
    row = json.loads(path.read_text())
    if change == "version":
        row["schema_version"] = 99
    else:
        row["router_spec"]["gate"]["renormalize"] = False
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RequestError, match="schema_version is 99" if change == "version" else "another spec"):
        run(["smoe"], ["lookup"], 1, tmp_path, knobs=FEW)


def test_a_run_that_diverges_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmoe.probes import runner
    from rmoe.probes.stack import Ensemble

    class Diverging(Ensemble):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            self.experts.data[1] = float("nan")

    monkeypatch.setattr(runner, "Ensemble", Diverging)
    with pytest.raises(RunError, match="smoe on lookup, seed 1; saved: every other run"):
        run(["smoe"], ["lookup"], 3, tmp_path, knobs=FEW)
    assert [row.seed for row in read_rows(tmp_path / "results.jsonl")[0]] == [0, 2]
    monkeypatch.undo()
    assert [row.seed for row in run(["smoe"], ["lookup"], 3, tmp_path, knobs=FEW)] == [0, 1, 2]


def test_a_run_whose_loss_hides_its_end_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN scores ask no expert at all, by ReLU's gate: the loss is finite, and the row could not be read again."""
    from rmoe.probes import runner
    from rmoe.probes.stack import Ensemble

    class Diverging(Ensemble):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            for parameter in self.parameters.values():
                parameter.data[1] = float("nan")

    monkeypatch.setattr(runner, "Ensemble", Diverging)
    with pytest.raises(RunError, match="remoe on lookup, seed 1; saved: every other run"):
        run(["remoe"], ["lookup"], 3, tmp_path, knobs=FEW)
    rows, unreadable = read_rows(tmp_path / "results.jsonl")
    assert [row.seed for row in rows] == [0, 2]
    assert not unreadable


def test_hash_is_a_router_that_knows_nothing() -> None:
    """Probes have no token ids: every token has the same one, so a table can only give a constant."""
    (row,) = run(["hash"], ["lookup"], 1, knobs=Knobs(steps=120, layers=2, experts=4))
    assert row.regret > 0.9
    assert max(row.mutual_information) == 0


def test_summary_statistics_are_compares() -> None:
    """Paired differences by hand."""
    import numpy as np
    from scipy import stats

    rows = run(["smoe", "rmoe"], ["lookup", "carry"], 3, knobs=FEW)
    summary = summarise(rows, "smoe")
    regret = {(r.router, r.probe, r.seed): r.regret for r in rows}
    card = next(card for card in summary.cards if card.router == "rmoe")
    differences = [regret["rmoe", "carry", s] - regret["smoe", "carry", s] for s in range(3)]
    against = card.scores["carry"].against
    assert against is not None
    assert against.mean == pytest.approx(np.mean(differences))
    half = stats.t.ppf(0.975, 2) * np.std(differences, ddof=1) / 3**0.5
    assert against.interval.high - against.mean == pytest.approx(half)
    assert card.scores[MEAN].regrets[1] == pytest.approx(
        (regret["rmoe", "lookup", 1] + regret["rmoe", "carry", 1]) / 2
    )
    assert summary.cards == sorted(summary.cards, key=lambda c: c.scores[MEAN].mean)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine.gpus", "1"), "--engine.gpus is 1; allowed: unset: probes run on cores"),
        (("--engine.runs-per-gpu", "3"), "--engine.runs-per-gpu is 3; allowed: unset"),
        (("--engine.node", "nosuch"), "engine.node is 'nosuch'; allowed: "),
        (("--engine.cpus", "9999"), "engine.cpus is 9999; allowed: at most "),
    ],
)
def test_engine_options_that_one_process_does_not_read_are_refused_too(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture
) -> None:
    asked = ("--routers", "smoe", "--probes", "carry", "--seeds", "1")
    assert main(["probe", *asked, *TINY, *options]) == 2
    assert said in capsys.readouterr().err
