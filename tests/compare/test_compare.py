"""`compare` on real, tiny runs: pairing, sharing, going on, sweeps; every run a few steps of a toy model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rmoe.compare import plan as plans
from rmoe.compare.compare import Options, compare
from rmoe.compare.engines import EngineConfig
from rmoe.data.config import DataConfig
from rmoe.errors import RequestError, RunError
from rmoe.records import append_records
from rmoe.report.page import write_report
from rmoe.results.rows import Failure, read_rows
from rmoe.training.config import LoggingConfig, ModelConfig, RunConfig, TrainingConfig
from rmoe.training.run_folder import locked

MODEL = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    moe_intermediate_size=8,
    hidden_dropout=0.1,
)
QUIET = Options(jobs=2, timing_rounds=0, analysis_tokens=0)
MATCHED = {"config": "wide", "routers": ["smoe", "low-rank"]}
ONE_BY_ONE = Options(jobs=1, timing_rounds=0, analysis_tokens=512)


def config_of(folder: Path, steps: int = 10) -> RunConfig:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {i}: the cat sat on mat {i * 7919 % 101}\n" for i in range(800)))
    return RunConfig(
        model=MODEL,
        data=DataConfig(path=str(text), cache_dir=str(folder / "cache")),
        training=TrainingConfig(max_steps=steps, batch_size=2, sequence_length=32, warmup_steps=2, threads=1),
        logging=LoggingConfig(every=5, evaluate_every=5),
    )


def weights(out: Path, key: str) -> str:
    return hashlib.sha256((out / "runs" / key / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A whole comparison: two routers, two seeds, one worker process for all four runs, analysed."""
    folder = tmp_path_factory.mktemp("compare")
    summary = compare(config_of(folder), ["smoe", "rmoe"], 2, folder / "out", options=ONE_BY_ONE)
    return folder, summary


def test_everything_is_written(shared):
    folder, summary = shared
    out = folder / "out"
    for name in ("results.jsonl", "summary.json", "summary.md", "analysis.json", "report/index.html"):
        assert (out / name).is_file(), name
    rows, problems = read_rows(out / plans.RESULTS)
    assert problems == []
    assert sorted(row.key for row in rows) == ["rmoe-seed0", "rmoe-seed1", "smoe-seed0", "smoe-seed1"]
    assert all(row.result.test is not None for row in rows)
    assert all(row.result.hardware.threads == 1 for row in rows)
    by_name = {router.router: router for router in summary.routers}
    assert by_name["rmoe"].parameters.router > by_name["smoe"].parameters.router
    assert by_name["rmoe"].difference.seeds == [0, 1]
    assert all(router.timing is None for router in summary.routers)  # no phase alone: blank, not guessed
    assert [m["name"] for m in json.loads((out / "analysis.json").read_text())["models"]] == ["smoe", "rmoe"]


def test_pairs_start_with_equal_weights_and_see_equal_batches(shared):
    """Training loss of the first rows differs only through the router; every shared parameter starts equal."""
    from rmoe.training.build import build_model, model_config

    folder, _ = shared
    models = [
        build_model(model_config(config_of(folder).with_setting("router", r), 256), 1)
        for r in ("smoe", "rmoe")
    ]
    one, other = (dict(model.named_parameters()) for model in models)
    same = [name for name in one.keys() & other.keys() if one[name].shape == other[name].shape]
    assert len(same) >= 15
    assert all((one[name] == other[name]).all() for name in same)


def test_a_workers_run_has_the_bits_of_a_run_in_this_process(shared, tmp_path):
    """The last of four runs in one worker, against the same run alone and elsewhere."""
    from rmoe.training.run import train

    folder, _ = shared
    config = config_of(folder).with_setting("router", "rmoe").with_setting("training.seed", 1)
    train(config, tmp_path / "alone", progress=False)
    alone = hashlib.sha256((tmp_path / "alone" / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert weights(folder / "out", "rmoe-seed1") == alone


@pytest.mark.slow
def test_runs_that_share_the_machine_have_the_bits_of_one_by_one_runs(shared):
    """Two at once against one by one; and here the routers are timed alone."""
    folder, _ = shared
    options = Options(jobs=2, timing_rounds=2, analysis_tokens=0)
    summary = compare(config_of(folder), ["smoe", "rmoe"], 2, folder / "both", options=options)
    for key in ("smoe-seed0", "rmoe-seed0", "smoe-seed1", "rmoe-seed1"):
        assert weights(folder / "both", key) == weights(folder / "out", key)
    for router in summary.routers:
        assert router.timing.seconds_per_1k_steps > 0
        assert router.timing.peak_mib > 50
        assert router.timing.rounds == 2


def test_a_finished_comparison_is_not_trained_again(shared, monkeypatch):
    """Its report is written again, with the folder still held."""
    folder, summary = shared
    before = (folder / "out" / "results.jsonl").read_bytes()
    module, real, tried = sys.modules[compare.__module__], write_report, []

    def while_held(*given, **named):
        with pytest.raises(RequestError, match="no other run is writing to"), locked(folder / "out"):
            pass
        tried.append(True)
        return real(*given, **named)

    monkeypatch.setattr(module, "write_report", while_held)
    again = compare(config_of(folder), ["smoe", "rmoe"], 2, folder / "out", options=ONE_BY_ONE)
    assert (folder / "out" / "results.jsonl").read_bytes() == before
    assert again == summary
    assert tried == [True]
    with locked(folder / "out"):
        pass


def test_two_comparisons_never_go_on_in_one_folder(shared):
    folder, _ = shared
    held = plans.held(folder / "out")
    with held, pytest.raises(RequestError, match=f"no other run is writing to.*process {os.getpid()}"):
        compare(config_of(folder), ["smoe", "rmoe"], 2, folder / "out", options=ONE_BY_ONE)


def test_another_comparison_in_the_folder_is_refused(shared):
    folder, _ = shared
    other = config_of(folder).with_setting("learning_rate", 0.5)
    with pytest.raises(
        RequestError, match=r"training.learning_rate is 0.5; allowed: 0.001, as the comparison"
    ):
        compare(other, ["smoe", "rmoe"], 2, folder / "out", options=QUIET)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seeds": 0}, "--seeds"),
        ({"baseline": "xmoe"}, "--baseline"),
        ({"options": Options(jobs=0)}, "--jobs"),
        ({"config": "router"}, "--router is"),
        ({"config": "k"}, "num_experts_per_tok"),
        ({"max_seeds": 8}, r"--seeds is 1; allowed: 2 or more with --until-decided"),
        ({"seeds": 5, "max_seeds": 4}, r"--max-seeds is 4; allowed: --seeds \(5\) or more"),
        ({"seeds": 3, "max_seeds": 4, "sweep": ["learning_rate=1e-3,1e-2"]}, r"--until-decided is True"),
        (
            {"routers": ["smoe", "hash"], "match_logits": 1.0},
            r"initial_logit_std is 1.0; allowed: None with router",
        ),
        (
            {"routers": ["smoe", "hash"], "config": "stages"},
            r"router.kind is 'hash'; allowed: a router that needs",
        ),
        ({"sweep": ["model.num_attention_heads=2,3"]}, r"num_attention_heads is 3"),
        (
            {"routers": ["smoe", "switch"], "sweep": ["num_experts_per_tok=1,2"]},
            r"--sweep is 'num_experts_per_tok'; allowed: another setting with switch, whose only k is 1",
        ),
        ({"match_logits": -1.0}, r"initial_logit_std is -1.0; allowed: above 0"),
        (
            {"config": "cuda", "options": Options(engine=EngineConfig(kind="ray", fetch="model"))},
            r"training.device is 'cuda'; allowed: auto with engine.fetch model",
        ),
        (
            {"lengths": (2, 4), "sweep": ["learning_rate=1e-3,1e-2"], "config": "wsd"},
            r"--lengths is '2 4'; allowed: left out with --sweep",
        ),
        (
            {"match_params": True, "sweep": ["moe_intermediate_size=200"], **MATCHED},
            r"--match-params is True; allowed: left out with a sweep that .* \(moe_intermediate_size\)",
        ),
        (
            {"match_params": True, "sweep": ["model.num_experts=4,8"], **MATCHED},
            r"--match-params is True; allowed: left out with a sweep that .* \(model.num_experts\)",
        ),
    ],
)
def test_a_wrong_request_writes_nothing(tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = config_of(tmp_path)
    wrong = {
        "router": config.with_setting("router", "xmoe"),
        "k": config.with_setting("model.num_experts_per_tok", 9),
        "wide": config.with_setting("moe_intermediate_size", 200),
        "wsd": config.with_setting("schedule", "wsd"),
        "cuda": config.with_setting("training.device", "cuda"),
        "stages": config.with_setting("parallel.pipeline", 2),
    }
    call = {"config": config, "routers": ["smoe", "rmoe"], "seeds": 1, "options": QUIET} | arguments
    call["config"] = wrong.get(call["config"], config) if isinstance(call["config"], str) else call["config"]
    with pytest.raises(RequestError, match=said):
        compare(out=tmp_path / "out", **call)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_router_gets_its_own_learning_rate_and_one_look_at_the_test_split(tmp_path):
    out = tmp_path / "out"
    sweep = ["learning_rate=1e-6,1e-2"]
    summary = compare(config_of(tmp_path), ["smoe", "rmoe"], 2, out, sweep=sweep, options=QUIET)
    rows, _ = read_rows(out / plans.RESULTS)
    assert len(rows) == 8
    assert {row.sweep["learning_rate"] for row in rows if row.result.test is not None} == {1e-2}
    assert sum(row.result.test is not None for row in rows) == 4
    assert {p.sweep["learning_rate"] for p in summary.sweep_points if p.chosen} == {1e-2}
    lines = (out / plans.RESULTS).read_text().splitlines()
    assert len(lines) == 8 + 4  # a line per run, and one more for each that was judged on the test split
    direct = compare(
        config_of(tmp_path).with_setting("learning_rate", 1e-2),
        ["smoe"],
        1,
        tmp_path / "direct",
        options=QUIET,
    )
    swept = next(r for r in summary.routers if r.router == "smoe")
    assert swept.test.values[0] == direct.routers[0].test.values[0]  # judged later, judged alike


@pytest.mark.slow
def test_parameters_are_matched(tmp_path):
    config = config_of(tmp_path).with_setting("moe_intermediate_size", 200)
    summary = compare(config, ["smoe", "low-rank"], 1, tmp_path / "out", match_params=True, options=QUIET)
    one, other = (router.parameters.non_embedding for router in summary.routers)
    assert abs(one / other - 1) < 0.005
    assert any(
        "Parameters are matched to smoe's within 0.5% by the experts' width" in note for note in summary.notes
    )


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(shared, tmp_path):
    """kill -9 of the comparison: its workers end too, and the same command finishes with equal weights."""
    folder, _ = shared
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from tests.compare.test_compare import *;"
        f"compare(config_of(Path({str(folder)!r})), ['smoe', 'rmoe'], 2, Path({str(out)!r}), options=QUIET)"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while _workers_of(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _workers_of(out) == []
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    for key in ("smoe-seed0", "smoe-seed1", "rmoe-seed0", "rmoe-seed1"):
        assert weights(out, key) == weights(folder / "out", key)


def _workers_of(out: Path) -> list[int]:
    """Processes that still write a log below `out`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "2").startswith(str(out)):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_failed_run_is_a_row_and_the_others_are_reported(tmp_path):
    config = (
        config_of(tmp_path, steps=30).with_setting("learning_rate", 1e30).with_setting("max_grad_norm", 0.0)
    )
    good = config_of(tmp_path, steps=30)
    out = tmp_path / "out"
    compare(good, ["smoe"], 2, out, options=QUIET)
    rows, _ = read_rows(out / plans.RESULTS)
    import msgspec

    (row,) = (row for row in rows if row.seed == 1)  # two at once finish in any order
    known = msgspec.structs.asdict(row.result)
    failure = Failure(error="loss is NaN", **{n: known[n] for n in Failure.__struct_fields__ if n != "error"})
    failed = msgspec.structs.replace(row, router="rmoe", result=None, failure=failure)
    append_records(out / plans.RESULTS, failed)
    summary = compare(good, ["smoe"], 2, out, options=QUIET)
    assert not any("failed" in note for note in summary.notes)  # nobody asks for that run any more
    with pytest.raises(RunError, match=r"every run failed, smoe-seed0 with: .*not finite"):
        compare(config, ["smoe"], 1, tmp_path / "diverged", options=QUIET)
    rows, _ = read_rows(tmp_path / "diverged" / plans.RESULTS)
    assert rows[0].result is None
    assert "not finite" in rows[0].failure.error


@pytest.mark.slow
def test_pairs_are_added_until_every_verdict_stands_and_resumed_alike(tmp_path):
    """One router is the baseline under another name (equal at once), one is hopeless, and one needs all pairs."""
    config = config_of(tmp_path, steps=10)
    out = tmp_path / "out"
    options = Options(
        jobs=2, timing_rounds=0, analysis_tokens=0, margin=10.0
    )  # everything is equivalent soon
    summary = compare(config, ["smoe", "rmoe"], 2, out, max_seeds=6, options=options)
    router = next(r for r in summary.routers if r.router == "rmoe")
    assert router.difference.verdict in (
        "equivalent",
        "better by less than the margin",
        "worse by less than the margin",
    )
    assert router.finished < 6
    assert any("Pairs not needed:" in note for note in summary.notes)
    lines = (out / plans.RESULTS).read_bytes()
    assert compare(config, ["smoe", "rmoe"], 2, out, max_seeds=6, options=options) == summary
    assert (out / plans.RESULTS).read_bytes() == lines
    with pytest.raises(RequestError, match=r"looks is None; allowed: \[2, 3, 4, 5, 6\], as the comparison"):
        compare(config, ["smoe", "rmoe"], 2, out, options=options)

    none = Options(
        jobs=2, timing_rounds=0, analysis_tokens=0, margin=1e-9
    )  # nothing is equivalent, little is better
    summary = compare(config, ["smoe", "rmoe"], 2, tmp_path / "none", max_seeds=3, options=none)
    rmoe = next(r for r in summary.routers if r.router == "rmoe")
    assert rmoe.finished == 3 or rmoe.difference.verdict in ("better", "worse")


@pytest.mark.slow
def test_logits_are_matched_and_routers_without_a_scale_left_out_of_all(tmp_path):
    summary = compare(
        config_of(tmp_path, steps=2), ["smoe", "rmoe"], 1, tmp_path / "out", match_logits=1.0, options=QUIET
    )
    assert [r.initial_logit_std for r in summary.routers] == pytest.approx([1.0, 1.0], rel=2e-3)
    assert not any("different scales" in note for note in summary.notes)


@pytest.mark.slow
def test_branches_give_a_law_and_bits_at_equal_time(tmp_path):
    """Real branches of real runs; with so few steps any law will do, or none, but each is said."""
    config = config_of(tmp_path, steps=40).with_setting("schedule", "wsd")
    options = Options(jobs=1, timing_rounds=1, analysis_tokens=0)
    out = tmp_path / "out"
    summary = compare(config, ["smoe", "rmoe"], 2, out, lengths=(10, 20), options=options)
    branches, _ = read_rows(out / plans.BRANCHES)
    assert {(row.seed, row.result.steps) for row in branches} == {(0, 10), (0, 20), (1, 10), (1, 20)}
    assert all(row.result.test is not None and row.router == "smoe" for row in branches)
    alone = compare(
        config.with_setting("max_steps", 20), ["smoe"], 1, tmp_path / "alone", options=QUIET
    )  # the branch is the shorter run itself
    (branch,) = (r.result for r in branches if (r.seed, r.result.steps) == (0, 20))
    assert branch.test == alone.routers[0].test.values[0]
    rmoe = next(r for r in summary.routers if r.router == "rmoe")
    if summary.law is None:
        assert any("no law goes through" in note for note in summary.notes)
    else:
        assert rmoe.equal_time.seconds_ratio > 0
    before = (out / plans.BRANCHES).read_bytes()
    compare(config, ["smoe", "rmoe"], 2, out, lengths=(10, 20), options=options)
    assert (out / plans.BRANCHES).read_bytes() == before
