"""The study at depth: its plan is whole, its rows are small and of one code, its table says what the rows say."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy import stats

from experiments import study
from experiments.study_rows import append_missing, coarser, read_study_rows, study_row, thinner
from experiments.study_table import LOOKS, Contrast, contrasts, markdown, over_training
from rmoe.compare.sequential import sequential_p
from rmoe.errors import RequestError
from rmoe.records import write_record
from rmoe.results.probes import ProbeRow
from rmoe.results.run import Averaged, Curve, InitialLogits, LayerCurve, RunResult, TextLosses
from rmoe.routing.zoo import find
from rmoe.training.build import load_plugins
from rmoe.training.environment import versions
from tests.compare.rows import changed, row
from tests.experiments.small import small_study, write_text


def run_of(router: str, seed: int, test: float, code: str = "0.1.0+gabc"):
    plain = row(router, seed, test, test=test)
    nats = [round(100 * test + index % 3, 3) for index in range(600)]
    losses = TextLosses(blocks=1, targets=60_000, nats=nats)
    curve = LayerCurve(unit="nats", step=list(range(0, 2000, 20)), value=[[0.123456, 1.0]] * 100)
    return changed(
        plain,
        versions=msgspec.structs.replace(plain.result.versions, code=code),
        initial_logits=InitialLogits(drawn=[0.16, 0.16], start=[1.0, 1.0], tokens=4096),
        layer_curves={"gate_entropy": curve},
        test_losses=losses,
        averaged=Averaged(steps=[1960, 2000], val=test, test=test - 0.01, test_losses=losses),
    )


def rows(code: str = "0.1.0+gabc"):
    """smoe at 2.0, 2.01, 2.02; rmoe better by 0.03, 0.02, 0.04."""
    smoe = [run_of("smoe", seed, 2.0 + 0.01 * seed, code) for seed in range(3)]
    rmoe = [
        run_of("rmoe-p32", seed, 2.0 + 0.01 * seed - d, code) for seed, d in enumerate((0.03, 0.02, 0.04))
    ]
    return [study_row("std-1", one.result) for one in (*smoe, *rmoe)]


@pytest.mark.parametrize(("name", "runs"), [("study.toml", 180), ("gpu.toml", 74)])
def test_every_grid_has_a_configuration_and_routers_that_exist(name, runs):
    plan = study.read_study(study.HERE / name)
    load_plugins((study.PLUGIN,))
    for stage in plan.stage:
        for grid in stage.grid:
            config = plan.config(grid, Path("text.txt"))
            assert config.training.schedule == "wsd"
            assert max(config.average_steps) == config.training.max_steps
            for router in grid.routers:
                find(router)
    keys = {
        (g.folder, r, s)
        for stage in plan.stage
        for g in stage.grid
        for r in g.routers
        for s in range(stage.seeds)
    }
    assert len(keys) == runs


def test_the_zoos_plan_has_rows_of_the_zoo_once_with_their_own_k():
    """At the study's size; what it does not say is study.toml's."""
    plan, own = study.read_study(study.HERE / "zoo.toml"), study.read_study()
    assert (plan.size, plan.margin, plan.baseline) == (own.size, own.margin, own.baseline)
    load_plugins((study.PLUGIN,))
    grids = [grid for stage in plan.stage for grid in stage.grid]
    routers = [router for grid in grids for router in grid.routers]
    assert len(routers) == len(set(routers)) == 43
    assert plan.baseline in next(grid.routers for grid in grids if grid.folder == plan.reference)
    for grid in grids:
        config = plan.config(grid, Path("text.txt"))
        assert (config.training.max_steps, config.training.branch_points) == (2000, ())
        for router in grid.routers:
            k = find(router).top_k or config.model.num_experts_per_tok
            assert config.model.num_experts_per_tok == k, router
            config.with_setting("router", router)


def test_a_plan_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "wrong.toml").write_text('like = "study.toml"\n')
    (tmp_path / "study.toml").write_text("margin = 'wide'\n")
    for name in ("wrong.toml", "gone.toml"):
        said = refused(capsys, "run", "--plan", str(tmp_path / name))
        assert said.startswith(f"error: --plan is '{tmp_path / name}'; allowed: a plan as study.toml is")


def test_seeds_come_before_grids():
    plan = study.read_study()
    first = [(grid.folder, seeds) for grid, seeds in study.steps(plan)][:4]
    assert first == [("std-1", 1), ("as-they-stand", 1), ("std-1", 2), ("as-they-stand", 2)]


def test_collecting_adds_what_is_new_and_the_table_says_it(tmp_path):
    path = tmp_path / "study.jsonl"
    assert append_missing(path, rows()[:4]) == 4
    assert append_missing(path, rows()) == 2
    assert append_missing(path, rows()) == 0
    found = read_study_rows(path)
    assert len(found) == 6
    table = markdown(found, "smoe", 0.005)
    line = next(line for line in table.splitlines() if "`rmoe-p32`" in line)
    interval = stats.ttest_1samp([-0.03, -0.02, -0.04], 0.0).confidence_interval(0.95)
    spread = np.std([3, 2, 4], ddof=1) / 100
    assert f"| -0.0300 | {interval.low:+.4f} to {interval.high:+.4f} | {spread:.4f} | 3 of 5 pairs |" in line
    assert "| 1.00 | 3 |" in line
    later = msgspec.structs.replace(found[-1].versions, code="0.1.0+gbbbb")
    assert f"code {found[0].versions.code} and 0.1.0+gbbbb, " in markdown(
        [*found[:-1], msgspec.structs.replace(found[-1], versions=later)], "smoe", 0.005
    )
    elsewhere = [msgspec.structs.replace(one, grid="zoo") for one in found]
    table = markdown(elsewhere, "smoe", 0.005, "zoo", "zoo.toml")
    assert "`experiments/zoo.toml`" in table
    assert line.replace("std-1", "zoo") in table


def test_rows_are_small_and_keep_the_sums():
    one = rows()[0]
    assert len(msgspec.json.encode(one)) < 12_000
    losses = run_of("smoe", 0, 2.0).result.test_losses
    assert len(coarser(losses).nats) <= 250
    assert sum(coarser(losses).nats) == pytest.approx(sum(losses.nats), abs=0.01)
    thin = thinner(run_of("smoe", 0, 2.0).result.layer_curves["gate_entropy"])
    assert thin.step[0] == 0
    assert thin.step[-1] == 1980
    assert len(thin.step) == 11


def refused(capsys, *arguments: str) -> str:
    assert study.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def finish(folder: Path, run: RunResult) -> None:
    """As training leaves it."""
    inside = folder / "runs" / f"{run.router}-seed{run.seed}"
    inside.mkdir(parents=True)
    write_record(inside / "result.json", run)


def test_runs_of_two_versions_of_the_code_are_refused(tmp_path, capsys):
    finish(tmp_path / "out" / "std-1", run_of("rmoe-p32", 0, 2.0, "0.1.0+gaaa").result)
    finish(tmp_path / "out" / "std-1", run_of("smoe", 0, 2.0, "0.1.0+gbbb").result)
    results = tmp_path / "study.jsonl"
    said = refused(capsys, "collect", "--out", str(tmp_path / "out"), "--results", str(results))
    assert said.startswith("error: code is '0.1.0+gbbb'; allowed: 0.1.0+gaaa")
    assert not results.exists()
    assert refused(capsys, "run", "--out", str(tmp_path / "out")).startswith("error: code is")
    equal = ["--equal-code", "0.1.0+gaaa", "--equal-code", "0.1.0+gbbb"]
    assert study.main(["collect", "--out", str(tmp_path / "out"), "--results", str(results), *equal]) == 0
    assert len(results.read_bytes().splitlines()) == 2
    capsys.readouterr()
    assert refused(capsys, "table", "--results", str(results)).startswith("error: code is")


def test_nothing_finished_is_no_file_and_no_table(tmp_path, capsys):
    results = tmp_path / "study.jsonl"
    asked = ["--out", str(tmp_path / "out"), "--results", str(results)]
    assert study.main(["collect", *asked]) == 0
    assert not results.exists()
    capsys.readouterr()
    assert refused(capsys, "table", *asked).startswith("error: --results is")
    results.touch()
    assert refused(capsys, "table", *asked).startswith("error: --results is")


def test_a_turn_keeps_all_jobs_busy():
    """Whole steps of the plan, joined until there are as many runs as jobs; nothing twice."""
    grids = [study.Grid(folder="a", routers=["smoe", "rmoe"]), study.Grid(folder="b", routers=["smoe"])]
    stage = study.Stage(name="one", seeds=3, grid=grids)
    plan = msgspec.structs.replace(study.read_study(), stage=[stage])

    def sizes(jobs: int) -> list[int]:
        return [len(runs) for runs in study.turns(plan, {("a", "smoe", 0)}, jobs)]

    assert sizes(1) == [1, 1, 2, 1, 2, 1]
    assert sizes(4) == [4, 4]
    assert sizes(100) == [8]
    (everything,) = study.turns(plan, {("a", "smoe", 0)}, 100)
    keys = [(grid.folder, router, seed) for grid, router, seed in everything]
    assert len(set(keys)) == 8
    assert keys[:2] == [("a", "rmoe", 0), ("b", "smoe", 0)]


def test_what_is_collected_is_not_trained_again(tmp_path, monkeypatch):
    """Whatever machine it was trained on: a new one has no run folders."""
    code = versions().code.removesuffix(".dirty")
    monkeypatch.setattr(study, "versions", lambda: msgspec.structs.replace(versions(), code=code))
    write_text(tmp_path)
    monkeypatch.setattr(study, "TEXT", "text.txt")
    plan = msgspec.structs.replace(small_study(["smoe", "rmoe"], seeds=2), equal_codes=[code, "0.1.0+gabc"])
    collected = tmp_path / "study.jsonl"
    append_missing(collected, [study_row("std-1", run_of("smoe", 0, 2.0).result)])
    study.run(plan, tmp_path, tmp_path / "out", collected, most=1)
    trained = {path.parent.name for path in (tmp_path / "out").glob("std-1/runs/*/result.json")}
    assert trained == {"rmoe-seed0"}
    assert {row.name for row in study.finished(plan, tmp_path / "out")} == {"rmoe-seed0"}


def test_a_run_of_the_early_study_is_refused(tmp_path, capsys):
    finish(tmp_path / "out" / "std-1", row("smoe", 0, 2.0).result)
    said = refused(capsys, "collect", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "s.jsonl"))
    assert said.startswith("error: results is 'smoe-seed0 in std-1'; allowed: runs of this study")
    assert refused(capsys, "table", "--results", str(tmp_path / "none.jsonl")).startswith(
        "error: --results is"
    )


def test_verdicts_come_at_five_pairs_with_the_boundary_of_two_looks():
    gains = {
        "random-smoe": (-0.014, -0.013, -0.016, -0.015, -0.014),
        "rmoe-p32": (0.004, 0.03, 0.011, 0.02, 0.008),
    }
    found = [study_row("std-1", run_of("smoe", s, 2.0 + 0.01 * s).result) for s in range(5)]
    for name, values in gains.items():
        found += [
            study_row("std-1", run_of(name, s, 2.0 + 0.01 * s - d).result) for s, d in enumerate(values)
        ]
    lines = {
        name: next(x for x in markdown(found, "smoe", 0.005).splitlines() if f"`{name}`" in x)
        for name in gains
    }
    assert "| worse |" in lines["random-smoe"]
    many = {("std-1", f"arm-{number}") for number in range(1000)} | {("depth-6", "rmoe"), ("std-1", "smoe")}
    later = next(x for x in markdown(found, "smoe", 0.005, planned=many).splitlines() if "`random-smoe`" in x)
    assert "| not decided |" in later  # its p of 0.00001 is not below 0.05 over a thousand arms to come
    assert stats.ttest_1samp(gains["rmoe-p32"], 0).pvalue < 0.05
    assert "| not decided |" in lines["rmoe-p32"]  # p = 0.036: not below the first look's boundary


def test_a_contrast_names_arms_of_its_plan(tmp_path):
    plan = tmp_path / "plan.toml"
    text = study.PLAN.read_text(encoding="utf-8")
    plan.write_text(text.replace('of = "std-1/rmoe-p{p}"', 'of = "std-1/rnoe-p{p}"'), encoding="utf-8")
    with pytest.raises(RequestError, match=r"contrast is 'std-1/rnoe-p32'; allowed: arms of the plan: "):
        study.read_study(plan)


def test_a_contrast_is_shown_at_the_first_look_and_corrected_over_those_planned():
    gains = {"a": (0.02, 0.021, 0.019, 0.022, 0.02), "b": (0.0, 0.01, -0.01, 0.005, 0.0), "c": (0.1, 0.1)}
    found = [
        study_row("std-1", run_of(name, seed, 2.0 + 0.01 * seed - gain).result)
        for name, values in gains.items()
        for seed, gain in enumerate(values)
    ]
    asked = [
        Contrast("planned", "std-1/a", "std-1/b", planned=True),
        Contrast("after", "std-1/b", "std-1/a"),
        Contrast("two pairs", "std-1/a", "std-1/c", planned=True),
        Contrast("not run", "std-1/a", "std-1/d"),
    ]
    lines = contrasts(found, asked).splitlines()[4:]
    at_five = stats.ttest_1samp(np.subtract(gains["a"], gains["b"]), 0).pvalue
    p = sequential_p([at_five], LOOKS)
    assert p > 2 * at_five  # three more pairs may still be looked at
    assert len(lines) == 2
    assert lines[0].startswith("| planned | `std-1/a` | `std-1/b` | 5 | -0.0194 | ")
    assert lines[0].endswith(f"| {2 * p:.3f} |")  # two were planned, one of them is still to come
    assert "| +0.0194 |" in lines[1]
    assert lines[1].endswith("|  |")
    assert contrasts(found, asked[2:]) == ""


def test_differences_over_training_are_paired_at_steps_that_all_have():
    def at(router: str, seed: int, **bits: float):
        row = study_row("std-1", run_of(router, seed, 2.0).result)
        curve = Curve(unit="bits_per_byte", step=[int(s[1:]) for s in bits], value=list(bits.values()))
        return msgspec.structs.replace(row, validation=curve)

    found = [
        at("smoe", 0, s200=3.0, s400=2.5), at("smoe", 1, s200=3.1, s400=2.5),
        at("rmoe-p32", 0, s200=3.2, s400=2.6, s600=2.0), at("rmoe-p32", 1, s200=3.5, s400=2.5, s600=2.0),
        at("random-smoe", 0, s200=3.0, s400=2.5),
    ]  # fmt: skip
    assert over_training(found, "smoe", "std-1").splitlines()[2:] == [
        "| grid | router | pairs | 200 | 400 |",
        "|---|---|---:|---|---|",
        "| std-1 | `rmoe-p32` | 2 | +0.3000 (0.1414) | +0.0500 (0.0707) |",
    ]
    assert over_training(found[:3], "smoe", "std-1") == ""


def test_what_was_evaluated_since_joins_its_run(tmp_path):
    path = tmp_path / "study.jsonl"
    append_missing(path, rows())
    later = [msgspec.structs.replace(one, domains={"tech": 2.5}) for one in rows()]
    assert append_missing(path, later) == 0
    assert {one.domains["tech"] for one in read_study_rows(path)} == {2.5}


def test_a_model_is_evaluated_on_texts_it_never_saw(tmp_path):
    """A real run, two short texts; the second call reads what the first wrote."""
    from experiments.study_domains import evaluate_domains, read_domains
    from rmoe.data.config import DataConfig
    from rmoe.training.config import LoggingConfig, ModelConfig, RunConfig, TrainingConfig
    from rmoe.training.run import train

    for name in ("own", "far"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {i * 7919 % 101}\n" for i in range(900)))
    config = RunConfig(
        router="smoe",
        model=ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=2),
        data=DataConfig(path=str(tmp_path / "own.txt")),
        training=TrainingConfig(max_steps=10, batch_size=2, sequence_length=16, warmup_steps=1, threads=1),
        logging=LoggingConfig(evaluate_blocks=2, final_blocks=2),
    )
    out = tmp_path / "run"
    train(config, out, progress=False)
    assert read_domains(out) == {}
    found = evaluate_domains(out, {"far": "far.txt"}, tmp_path)
    assert 0 < found["far"] < 9
    assert evaluate_domains(out, {"far": "gone.txt"}, tmp_path) == found == read_domains(out)


def test_the_committed_results_are_read():
    assert read_study_rows(study.COLLECTED)
    lines = gzip.decompress((study.COLLECTED.parent / "probes.jsonl.gz").read_bytes())
    rows = [msgspec.json.decode(line, type=ProbeRow) for line in lines.splitlines()]
    assert len(rows) == lines.count(b"\n") > 100
