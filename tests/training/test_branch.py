"""A run that branches from a longer one is, bit for bit, the run of its own length."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.routing.balance import SelectionBias
from rmoe.training.branch import require_steady
from rmoe.training.build import build_model, model_config
from rmoe.training.metrics import read_metrics
from rmoe.training.run import train
from tests.training import tiny


def config(text, steps: int, points: tuple[int, ...] = (), **more):
    return tiny.config(
        text, max_steps=steps, schedule="wsd", branch_points=points, average=2, average_every=1, **more
    )


@pytest.fixture(scope="module")
def long(text, tmp_path_factory):
    """20 steps, constant to 16; runs of 10 and 15 steps are constant to 8 and 12."""
    out = tmp_path_factory.mktemp("branch") / "long"
    train(config(text, 20, (8, 12)), out, progress=False)
    return out


@pytest.mark.parametrize("steps", [10, pytest.param(15, marks=pytest.mark.slow)])
def test_a_branch_is_the_shorter_run(text, long, tmp_path, steps):
    whole = train(config(text, steps), tmp_path / "whole", progress=False)
    branch = train(config(text, steps), tmp_path / "branch", progress=False, branch_of=long)
    assert tiny.weights(tmp_path / "branch") == tiny.weights(tmp_path / "whole")
    assert branch.test_losses == whole.test_losses
    assert branch.averaged == whole.averaged

    def train_rows(name):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(row["step"], row["loss"], row["lr"]) for row in rows if row["kind"] == "train"]

    # Every third step is logged, and the last, but the long run's rows are its own: the same up to the branch.
    assert train_rows("branch") == train_rows("whole")


def changed(text, **training):
    wrong = config(text, 10)
    return replace(wrong, training=replace(wrong.training, **training))


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"max_steps": 40}, r"training.max_steps is 40; allowed: at most 20, the steps of the run"),
        (
            {"max_steps": 6, "average": 0},
            r"--branch-of is .*allowed: a run that kept checkpoint-5 \(training.branch_points\)",
        ),
        ({"learning_rate": 0.5}, r"training.learning_rate is 0.5; allowed: 0.001, as the run"),
        ({"schedule": "linear"}, r"--branch-of is .*allowed: a run with schedule wsd, not linear"),
        ({"average": 5}, r"training.average is 5; allowed: averages after step 8 alone"),
    ],
)
def test_a_wrong_branch_is_refused_and_nothing_is_kept(text, long, tmp_path, training, said):
    out = tmp_path / "out"
    with pytest.raises(RequestError, match=said):
        train(changed(text, **training), out, progress=False, branch_of=long)
    assert not out.exists() or [path.name for path in out.iterdir()] == ["run.lock"]


def require_steady_with(text, long, router, option=(), k=2, **training):
    wanted = replace(changed(text, **training), router=router, router_option=option)
    wanted = replace(wanted, model=replace(wanted.model, num_experts_per_tok=k))
    model = build_model(model_config(wanted, 64), 0)
    require_steady(model, torch.arange(64).view(2, 32), wanted, long)


def test_a_run_of_one_step_has_nothing_to_be_steady_over(text, long):
    require_steady_with(text, long, "rmoe", max_steps=1, warmup_steps=0, average=0, average_every=None)


@pytest.mark.parametrize(
    ("router", "more", "state"),
    [
        ("smoe-annealed", {}, "temperature.log_value"),
        ("smoe", {"option": ("gate.start_k=1",)}, "gate.current_k"),
        ("stable-moe", {"k": 1}, "stage"),
    ],
)
def test_a_router_that_follows_the_length_is_refused(text, long, router, more, state):
    with pytest.raises(RequestError, match=rf"a router without {state}: it moves with the length of the run"):
        require_steady_with(text, long, router, **more)


def test_so_is_a_plugins_own(text, long, monkeypatch):
    for router in ("smoe", "smoe-bias", "remoe", "quantile-balance"):
        require_steady_with(text, long, router)

    def follow(self, layer, stats, step, total_steps):
        self.bias.fill_(step / total_steps)

    monkeypatch.setattr(SelectionBias, "update", follow)
    with pytest.raises(RequestError, match=r"a router without selection_bias\.bias"):
        require_steady_with(text, long, "smoe-bias")


def test_a_damaged_branch_point_is_refused(text, long, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(long, copy)
    weights = copy / "checkpoints" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(RequestError, match=r"kept checkpoint-8 .*: s(ha256|ize) mismatch"):
        train(config(text, 10), tmp_path / "out", progress=False, branch_of=copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"branch_points": (17,)},
            r"branch_points is '17'; allowed: steps of the constant part, 4 to 16 of 20",
        ),
        ({"branch_points": (25,)}, r"branch_points is '25'; allowed: steps of the constant part"),
        (
            {"branch_points": (8,), "schedule": "cosine"},
            r"allowed: none: schedule cosine has no constant part",
        ),
        ({"warmup_steps": 17}, r"warmup_steps is 17; allowed: 0 to 16, where the decay begins"),
        ({"average": 1}, r"training.average is 1; allowed: 0, which is off, or 2 or more"),
        ({"average": 21}, r"training.average is 21"),
        ({"average": 3, "average_every": 10}, r"training.average is 3"),
        ({"router_learning_rate": 0.0}, r"router_learning_rate is 0.0; allowed: above 0"),
    ],
)
def test_wrong_settings_are_refused(text, changes, said):
    with pytest.raises(RequestError, match=said):
        tiny.config(text, **({"schedule": "wsd"} | changes))
