"""Phases of a comparison on rows and answers that are given: what is measured again, where, and which rows count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from rmoe.compare.compare import _here, _near, _of_earlier_calls
from rmoe.compare.engines import Answer, Engine, EngineConfig, Wants
from rmoe.compare.engines.engine import Job
from rmoe.compare.jobs import EvaluateTest
from rmoe.compare.phases import (
    Options,
    Setting,
    analyse,
    evaluate_chosen,
    planned_rows,
    time_each_alone,
    train_until_decided,
)
from rmoe.compare.plan import ComparisonPlan, enter
from rmoe.compare.sharing import Sharing
from rmoe.records import append_records
from rmoe.results.analysis import Analysis, ModelAnalysis
from rmoe.results.rows import ResultRow, Timing
from rmoe.training.accounting import Window
from rmoe.training.config import RunConfig
from rmoe.training.metrics import MetricsLog, read_metrics
from rmoe.training.publish import layer_curves
from tests.compare.engines.jobs import Environment
from tests.compare.rows import row


def setting_of(out: Path, options: Options = Options(), wants: Wants = Wants(), **plan) -> Setting:  # noqa: B008  frozen
    asked = {"config": RunConfig(), "routers": ("smoe",), "seeds": 1, "baseline": "smoe"} | plan
    known = row("smoe", 0, 2.0).result
    assert known is not None
    return Setting(
        plan=ComparisonPlan(**asked),
        out=out,
        sharing=Sharing(jobs=1, threads=1),
        options=options,
        corpus=known.corpus,
        versions=known.versions,
        hardware=known.hardware,
        wants=wants,
    )


class Measured(Engine):
    """Answers with a model that says in which folder it was measured."""

    at_once = "1 at once"

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        for name, job in jobs.items():
            model = ModelAnalysis(
                name=job.name,
                summary=f"{Path(job.folder).name} {job.tokens}",
                layers=1,
                experts=2,
                experts_per_token=1,
                layer_names=["0"],
            )
            yield name, Answer(value=model)

    def close(self, interrupted: bool) -> None:
        pass


class Trained(Engine):
    """Runs that fail or end with a loss by their router; what is asked for is kept."""

    at_once = "1 at once"

    def __init__(self, losses: Mapping[str, float]) -> None:
        self.losses, self.asked = losses, list[str]()

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        self.asked += jobs
        for name, job in jobs.items():
            router, _, seed = name.partition("-seed")
            loss = self.losses.get(router)
            if isinstance(job, EvaluateTest):
                yield name, Answer(value=loss)
            elif loss is None:
                yield name, Answer(error="out of memory")
            else:
                ended = loss + 0.001 * (int(seed) % 3)
                yield name, Answer(value=row(router, int(seed), ended, test=ended).result)

    def close(self, interrupted: bool) -> None:
        pass


def measured(analysis: Analysis | None) -> list[str]:
    assert analysis is not None
    return [model.summary for model in analysis.models]


def test_routing_is_measured_again_when_another_run_is_chosen_or_more_tokens_asked_for(tmp_path):
    sweep = {"learning_rate": (1e-3, 3e-3)}
    setting = setting_of(tmp_path, sweep=sweep)
    first, second = (f"smoe-seed0-learning_rate={rate}" for rate in (0.001, 0.003))
    for rate, loss in ((1e-3, 2.0), (3e-3, 2.1)):
        append_records(setting.results, row("smoe", 0, loss, sweep={"learning_rate": rate}, test=None))
    analysis = analyse(setting, Measured())
    assert measured(analysis) == [f"{first} 65536"]
    assert analysis.notes == [f"Analysed: {first}; at most 65,536 tokens each."]
    before = (tmp_path / "analysis.json").stat().st_mtime_ns
    assert analyse(setting, Measured()) == analysis
    assert (tmp_path / "analysis.json").stat().st_mtime_ns == before  # what is known is not measured again

    fewer = replace(setting, options=Options(analysis_tokens=512))
    assert measured(analyse(fewer, Measured())) == [f"{first} 512"]

    for rate, loss in ((1e-3, 2.4), (3e-3, 2.1)):
        append_records(setting.results, row("smoe", 1, loss, sweep={"learning_rate": rate}, test=None))
    two = replace(setting, plan=replace(setting.plan, seeds=2))
    assert measured(analyse(two, Measured())) == [f"{second} 65536"]


def test_a_router_whose_runs_fail_gets_no_more_pairs(tmp_path, capsys):
    """And each of its runs is started once."""
    routers, looks = ("smoe", "rmoe", "xmoe"), (2, 3, 4)
    setting = setting_of(tmp_path, routers=routers, seeds=2, looks=looks)
    engine = Trained({"smoe": 2.0, "xmoe": 2.0004})
    assert train_until_decided(setting, engine).plan.decided == {"rmoe": 2, "xmoe": 2}
    assert sorted(engine.asked) == sorted(f"{router}-seed{seed}" for router in routers for seed in (0, 1))
    assert "no more pairs, as runs fail: rmoe" in capsys.readouterr().err


def test_without_a_baseline_there_is_nothing_to_wait_for(tmp_path):
    setting = setting_of(tmp_path, routers=("smoe", "xmoe"), seeds=2, looks=(2, 3, 4))
    engine = Trained({"xmoe": 2.0})
    train_until_decided(setting, engine)
    assert sorted(engine.asked) == ["smoe-seed0", "smoe-seed1", "xmoe-seed0", "xmoe-seed1"]


def test_a_router_that_is_no_longer_asked_for_is_judged_on_the_test_split_too(tmp_path):
    setting = setting_of(tmp_path, sweep={"learning_rate": (1e-3,)})
    for router in ("smoe", "xmoe"):
        append_records(setting.results, row(router, 0, 2.0, sweep={"learning_rate": 1e-3}, test=None))
    evaluate_chosen(setting, Trained({"smoe": 2.0, "xmoe": 2.5}))
    assert {each.router: each.run.test for each in setting.rows().values()} == {"smoe": 2.0, "xmoe": 2.5}


def test_a_window_whose_only_batch_was_skipped_loses_no_measure(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"kind": "train", "step": 1, "gate_entropy": [1.0], "load_imbalance": [1.0]})
    log.append({"kind": "train", "step": 2, **Window().row()})
    log.append({"kind": "train", "step": 3, "gate_entropy": [0.5], "load_imbalance": [2.0]})
    curves = layer_curves(read_metrics(log.path))
    assert {name: curve.step for name, curve in curves.items()} == {
        "gate_entropy": [1, 3],
        "load_imbalance": [1, 3],
    }


@pytest.mark.parametrize(("here", "sees"), [("", ""), ("4,5", "4")])
def test_fetched_models_are_evaluated_with_what_this_machine_has(tmp_path, monkeypatch, here, sees):
    """Trained on two GPUs each, on a cluster; this machine may have none, or others."""
    monkeypatch.delenv("RMOE_SIMULATED_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", here)
    options = Options(engine=EngineConfig(kind="ray", fetch="model", gpus=2))
    setting = _here(setting_of(tmp_path, options, Wants(gpus=2, processes=2)))
    job = Environment(names=["CUDA_VISIBLE_DEVICES"])
    with _near(setting, Measured()) as near:
        ((_, answer),) = near.answers({"test": job}, setting.one)
    assert answer.value["CUDA_VISIBLE_DEVICES"] == sees


def test_with_a_shared_folder_models_are_evaluated_where_they_were_trained(tmp_path):
    setting, engine = setting_of(tmp_path, wants=Wants(gpus=2)), Measured()
    assert _here(setting) is setting
    with _near(setting, engine) as near:
        assert near is engine


@pytest.mark.parametrize(
    ("looks", "counted"), [(None, ["smoe-seed0", "rmoe-seed0", "smoe-seed1"]), ((2, 3), ["smoe-seed0"])]
)
def test_a_failed_run_nobody_asks_for_any_more_does_not_count(tmp_path, looks, counted):
    setting = setting_of(tmp_path, looks=looks)
    for one in (row("smoe", 0, 2.0), row("rmoe", 0, 2.0), row("smoe", 1, 2.0)):
        append_records(setting.results, one)
    append_records(setting.results, row("rmoe", 1, None, status="failed"))
    assert [each.key for each in planned_rows(setting)[0]] == counted


def test_a_failed_run_that_is_asked_for_counts(tmp_path):
    setting = setting_of(tmp_path)
    append_records(setting.results, row("smoe", 0, None, status="failed"))
    assert [each.key for each in planned_rows(setting)[0]] == ["smoe-seed0"]


def replace_begun(one: ResultRow, begun: str) -> ResultRow:
    assert one.timing is not None
    return msgspec.structs.replace(one, timing=msgspec.structs.replace(one.timing, begun=begun))


class Timed(Engine):
    """Times every router alike, at a machine's speed; what was asked for is kept."""

    at_once = "1 at once"

    def __init__(self, seconds: float, begun: str) -> None:
        self.seconds, self.begun, self.asked = seconds, begun, list[str]()

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        for name, job in jobs.items():
            self.asked += job.configs
            one = Timing(seconds_per_1k_steps=self.seconds, peak_mib=1, steps=24, rounds=3, begun=self.begun)
            yield name, Answer(value=dict.fromkeys(job.configs, one))

    def close(self, interrupted: bool) -> None:
        pass


def test_a_router_that_joins_has_all_of_the_table_timed_again(tmp_path):
    """Also one of an earlier call that is not asked for now: its old time would stand beside new ones."""
    setting = setting_of(tmp_path, routers=("smoe", "rmoe"))
    for router in ("smoe", "rmoe", "xmoe"):
        append_records(setting.results, row(router, 0, 2.0))

    def call(routers: tuple[str, ...], seconds: float, begun: str) -> tuple[list[str], set[float]]:
        engine = Timed(seconds, begun)
        asked = replace(setting, plan=replace(setting.plan, routers=routers))
        time_each_alone(asked, engine)
        return engine.asked, {r.timing.seconds_per_1k_steps for r in planned_rows(asked)[0] if r.timing}

    assert call(("smoe", "rmoe"), 100.0, "first") == (["smoe", "rmoe", "xmoe"], {100.0})
    append_records(setting.results, row("hyper-moe", 0, 2.0))
    every = ["smoe", "rmoe", "xmoe", "hyper-moe"]
    assert call(("smoe", "hyper-moe"), 60.0, "second") == (every, {60.0})
    assert call(tuple(every), 50.0, "third") == ([], {60.0})
    half = next(
        r for r in planned_rows(setting)[0] if r.router == "rmoe"
    )  # a call that was killed as it wrote
    append_records(setting.results, replace_begun(half, "another"))
    assert call(("smoe",), 40.0, "fourth") == (every, {40.0})


@pytest.mark.parametrize("what", ["result", "model"])
def test_a_model_that_was_not_fetched_is_nowhere(tmp_path, what):
    class Fetching(Measured):
        def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
            for name in jobs:
                yield name, Answer(value=(row("smoe", 0, 2.0).result, {}))

    options = Options(engine=EngineConfig(kind="ray", fetch=what), timing_rounds=0)
    setting = train_until_decided(setting_of(tmp_path, options), Fetching())
    (found,) = setting.rows().values()
    assert found.result.folder == str(tmp_path / "runs" / "smoe-seed0")
    assert (found.result.model is None) == (what == "result")


@pytest.mark.parametrize(
    ("earlier", "now", "said"),
    [
        ({"rmoe": {"model.moe_intermediate_size": 40}}, {}, ["model.moe_intermediate_size 40"]),
        ({}, {"np": {"model.moe_intermediate_size": 44}}, ["no matched parameters"]),
        ({}, {}, []),
        ({}, {"switch": {"model.num_experts_per_tok": 1}}, []),
    ],
)
def test_a_router_of_an_earlier_call_with_other_settings_is_named(tmp_path, earlier, now, said):
    enter(tmp_path, setting_of(tmp_path, routers=("smoe", "rmoe"), changes=earlier).plan, "x", {})
    setting = setting_of(tmp_path, routers=("smoe", *now), changes=now)
    enter(tmp_path, setting.plan, "x", {})
    assert _of_earlier_calls(setting, ["smoe", "rmoe", *now]) == [
        f"rmoe, of an earlier call, has {one}: it is no like-for-like comparison." for one in said
    ]
