"""Which runs there are, and which folders are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rmoe.compare import plan as plans
from rmoe.compare.plan import ComparisonPlan
from rmoe.compare.sharing import share
from rmoe.errors import RequestError
from rmoe.routing.zoo import ZOO, select
from rmoe.training.config import RunConfig

CONFIG = RunConfig()


def plan(**more) -> ComparisonPlan:
    return ComparisonPlan(
        **{"config": CONFIG, "routers": ("smoe", "rmoe"), "seeds": 2, "baseline": "smoe"} | more
    )


def test_runs_are_paired_and_seed_by_seed():
    runs = plan().runs()
    assert [run.key for run in runs] == ["smoe-seed0", "rmoe-seed0", "smoe-seed1", "rmoe-seed1"]
    assert [run.config.training.seed for run in runs] == [0, 0, 1, 1]
    assert [run.config.router for run in runs] == ["smoe", "rmoe", "smoe", "rmoe"]
    assert all(run.config.logging.test for run in runs)
    first, second = (run.config.to_dict() for run in runs[:2])
    assert {k for k in first if first[k] != second[k]} == {"router"}  # nothing else tells a pair apart


def test_seeds_start_at_the_configurations_own():
    config = CONFIG.with_setting("training.seed", 7)
    assert [run.seed for run in plan(config=config, routers=("smoe",)).runs()] == [7, 8]


def test_a_sweep_keeps_the_test_split_for_later():
    sweep = plans.parse_sweep(CONFIG, ["learning_rate=1e-3,3e-3", "training.weight_decay=0.1"])
    assert sweep == {"learning_rate": (0.001, 0.003), "training.weight_decay": (0.1,)}
    runs = plan(sweep=sweep, seeds=1).runs()
    assert [run.key for run in runs] == [
        "smoe-seed0-learning_rate=0.001-training.weight_decay=0.1",
        "rmoe-seed0-learning_rate=0.001-training.weight_decay=0.1",
        "smoe-seed0-learning_rate=0.003-training.weight_decay=0.1",
        "rmoe-seed0-learning_rate=0.003-training.weight_decay=0.1",
    ]
    assert [run.config.training.learning_rate for run in runs] == [0.001, 0.001, 0.003, 0.003]
    assert not any(run.config.logging.test for run in runs)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("learning_rate", "SETTING=VALUE"),
        ("learning_rate=", "SETTING=VALUE"),
        ("nonsense=1", "setting is 'nonsense'"),
        ("learning_rate=fast", "training.learning_rate is 'fast'"),
        ("learning_rate=-1", "above 0"),
        ("seed=1,2", "--seeds"),
        ("router=smoe,rmoe", "--routers"),
        ("data.max_bytes=1000", "a setting that leaves the text as it is"),
        ("tokenizer=words", "a setting that leaves the text as it is"),
        ("preset=quick,small", "a setting of the model or its training"),
        ("logging.test=true,false", "a setting of the model or its training"),
        ("parallel.fsdp=1,2", "a setting of the model or its training"),
        ("checkpoints.keep=1,2", "a setting of the model or its training"),
    ],
)
def test_a_wrong_sweep_is_refused(asked, said):
    with pytest.raises(RequestError, match=said):
        plans.parse_sweep(CONFIG, [asked])


@pytest.mark.parametrize("again", ["learning_rate=5e-3", "training.learning_rate=5e-3"])
def test_a_setting_swept_twice_is_refused(again):
    with pytest.raises(
        RequestError, match=r"each setting once, with all its values: training\.learning_rate="
    ):
        plans.parse_sweep(CONFIG, ["learning_rate=1e-3,2e-3", again])


def test_router_names():
    assert select(["rmoe", "smoe", "rmoe"]) == ("rmoe", "smoe")
    assert select(["all"]) == tuple(ZOO)
    with pytest.raises(RequestError, match="router is 'nosuch'"):
        select(["smoe", "nosuch"])
    with pytest.raises(RequestError, match="--routers"):
        select([])


def test_a_router_with_one_k_only_runs_at_it():
    assert CONFIG.model.num_experts_per_tok == 2
    changes = plans.only_k(["smoe", "switch", "gshard"], CONFIG)
    assert changes == {"switch": {"model.num_experts_per_tok": 1}}
    three = CONFIG.with_setting(
        "model.num_experts_per_tok", 3
    )  # gshard's mechanism says so, its row does not
    assert plans.only_k(["smoe", "gshard"], three) == {"gshard": {"model.num_experts_per_tok": 2}}
    run = plan(routers=("switch",), changes=changes).runs()[0]
    assert run.config.model.num_experts_per_tok == 1


def test_more_seeds_and_routers_go_on_with_a_comparison(tmp_path):
    plans.enter(tmp_path / "out", plan(), "a" * 64)
    plans.enter(tmp_path / "out", plan(seeds=5), "a" * 64)
    plans.enter(tmp_path / "out", plan(routers=("smoe", "rmoe", "xmoe")), "a" * 64)


WIDTH = {"rmoe": {"model.moe_intermediate_size": 120}}


@pytest.mark.parametrize(("first", "then"), [(WIDTH, {}), ({}, WIDTH)])
def test_settings_of_a_router_s_own_cannot_come_or_go_between_two_calls(tmp_path, first, then):
    """`--match-params` dropped or added: one router's runs would be of two sizes."""
    plans.enter(tmp_path / "out", plan(changes=first), "a" * 64)
    (tmp_path / "out" / "runs" / "rmoe-seed0").mkdir(parents=True)
    before = (tmp_path / "out" / plans.COMPARISON).read_bytes()
    with pytest.raises(RequestError, match=r"settings of rmoe is .*--match-params"):
        plans.enter(tmp_path / "out", plan(seeds=5, changes=then), "a" * 64)
    assert (tmp_path / "out" / plans.COMPARISON).read_bytes() == before


def test_a_router_without_a_run_may_come_with_settings_of_its_own(tmp_path):
    plans.enter(tmp_path / "out", plan(routers=("smoe",)), "a" * 64)
    (tmp_path / "out" / "runs" / "smoe-seed0").mkdir(parents=True)
    plans.enter(tmp_path / "out", plan(changes=WIDTH), "a" * 64)
    plans.enter(tmp_path / "out", plan(routers=("smoe",)), "a" * 64)
    with pytest.raises(RequestError, match=r"settings of rmoe is \{\}"):
        plans.enter(tmp_path / "out", plan(), "a" * 64)


def test_killed_while_its_first_file_was_written_a_comparison_begins_anew(tmp_path):
    with plans.held(tmp_path):
        (tmp_path / f"{plans.COMPARISON}.part").write_bytes(b"{")
    with plans.held(tmp_path):
        assert plans.enter(tmp_path, plan(), "a" * 64) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [plans.COMPARISON, "run.lock"]


def test_plugins_are_compared_by_content(tmp_path):
    """Where they lie does not matter, what they say does."""
    mine = plan(config=replace(CONFIG, plugin=("a/mine.py",)))
    moved = plan(config=replace(CONFIG, plugin=("b/mine.py",)))
    plans.enter(tmp_path / "out", mine, "a" * 64, {"a/mine.py": "1" * 64})
    plans.enter(tmp_path / "out", moved, "a" * 64, {"b/mine.py": "1" * 64})
    with pytest.raises(RequestError, match=r"plugin is 'a/mine.py'; allowed: of the content \(sha256\)"):
        plans.enter(tmp_path / "out", mine, "a" * 64, {"a/mine.py": "2" * 64})


def test_another_engine_is_allowed_and_said(tmp_path):
    assert plans.enter(tmp_path / "out", plan(), "a" * 64, {}, "slurm") == []
    (note,) = plans.enter(tmp_path / "out", plan(), "a" * 64, {}, "local")
    assert note.startswith("The grid was begun on slurm and is continued on local: finished runs stay")
    assert plans.enter(tmp_path / "out", plan(), "a" * 64, {}, "local") == []


@pytest.mark.parametrize(
    ("other", "data", "said"),
    [
        (
            plan(config=CONFIG.with_setting("learning_rate", 9e-3)),
            "a",
            "training.learning_rate is 0.009; allowed: 0.001",
        ),
        (
            plan(config=CONFIG.with_setting("training.threads", 2)),
            "a",
            "training.threads is 2; allowed: None",
        ),
        (plan(sweep={"learning_rate": (1.0,)}), "a", "sweep is"),
        (plan(), "b", "text"),
        (plan(changes={"rmoe": {"model.moe_intermediate_size": 5}}), "a", "settings of rmoe"),
    ],
)
def test_another_comparison_is_refused(tmp_path, other, data, said):
    plans.enter(tmp_path, plan(changes={"rmoe": {"model.moe_intermediate_size": 7}}), "a")
    before = (tmp_path / plans.COMPARISON).read_bytes()
    with pytest.raises(RequestError, match=said):
        plans.enter(tmp_path, other, data)
    assert (tmp_path / plans.COMPARISON).read_bytes() == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="a new or empty folder"):
        plans.enter(tmp_path, plan(), "a")
    with pytest.raises(RequestError, match="allowed: a folder"):
        plans.enter(tmp_path / "notes.txt", plan(), "a")
    with pytest.raises(RequestError, match="a new or empty folder"), plans.held(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_threads_do_not_follow_from_jobs():
    model, training = CONFIG.model, CONFIG.training
    threads = {share(model, training, jobs, on_gpu=False).threads for jobs in (None, 1, 2, 8)}
    assert threads == {1}
    assert share(model, training, 5, on_gpu=False).jobs == 5
    large = RunConfig.from_preset("pretrain-0.9b")
    assert share(large.model, large.training, None, on_gpu=True).jobs is None  # as many as the GPUs take


def test_a_comparison_of_a_version_with_fewer_settings_goes_on(tmp_path):
    plans.enter(tmp_path / "out", plan(), "a" * 64)
    path = tmp_path / "out" / plans.COMPARISON
    stored = json.loads(path.read_text())
    del stored["config"]["training"]["average"]
    path.write_text(json.dumps(stored))
    averaged = plan()
    averaged = replace(averaged, config=averaged.config.with_setting("training.average", 2))
    with pytest.raises(RequestError, match=r"training.average is 2; allowed: 0"):
        plans.enter(tmp_path / "out", averaged, "a" * 64)
    plans.enter(tmp_path / "out", plan(), "a" * 64)
