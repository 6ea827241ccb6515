"""`--match-params`: equal parameters, or a refusal."""

from __future__ import annotations

import pytest

from rmoe.compare.match import ALIGNED, TOLERANCE, matched_width
from rmoe.errors import RequestError


def test_a_costlier_router_gets_narrower_experts():
    counts = {"smoe": {352: 36_080_000, 353: 36_215_168}, "rmoe": {352: 36_510_000, 353: 36_645_168}}
    value, error = matched_width(352, counts["rmoe"], counts["smoe"][352])
    assert value == 349
    assert error == (36_510_000 - 3 * 135_168) / 36_080_000 - 1
    assert abs(error) <= TOLERANCE


def test_a_cheaper_router_gets_wider_experts():
    value, error = matched_width(64, {64: 10_000, 65: 10_020}, 10_100)
    assert (value, error) == (69, 0.0)
    assert value % ALIGNED


def test_a_width_the_fast_kernel_takes_is_preferred_within_the_tolerance():
    assert matched_width(64, {64: 100_000, 65: 100_050}, 100_250)[0] == 72  # +0.15%, where 69 would be exact
    assert matched_width(64, {64: 10_000, 65: 10_050}, 10_250)[0] == 69  # 72 would be 1.5% off


def test_too_coarse_a_knob_is_refused():
    with pytest.raises(RequestError, match="--match-params"):
        matched_width(4, {4: 1000, 5: 1200}, 1100)


def test_a_sweep_that_changes_no_number_of_parameters_leaves_them_matched():
    pytest.importorskip("torch")
    from rmoe.compare.compare import _require_matched
    from rmoe.compare.plan import ComparisonPlan
    from rmoe.training.config import RunConfig

    swept = {"learning_rate": (1e-3, 3e-3), "hidden_dropout": (0.0, 0.1), "num_experts_per_tok": (1, 2)}
    changes = {"low-rank": {"model.moe_intermediate_size": 72}}
    plan = ComparisonPlan(RunConfig(), ("smoe", "low-rank"), 1, "smoe", sweep=swept, changes=changes)
    _require_matched(plan, 256)


def test_counts_of_real_models_agree_with_what_is_built():
    """The slope that the search assumes is the model's: counted on the meta device, against real parameters."""
    torch = pytest.importorskip("torch")
    from rmoe.compare.compare import _count
    from rmoe.model import count_parameters
    from rmoe.training.build import build_model, model_config
    from rmoe.training.config import ModelConfig, RunConfig

    small = ModelConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, moe_intermediate_size=8
    )
    config = RunConfig(router="rmoe", model=small)
    counts = [_count(config.with_setting("moe_intermediate_size", w), 256) for w in (8, 9, 12)]
    assert counts[2] - counts[0] == 4 * (counts[1] - counts[0])
    real = count_parameters(build_model(model_config(config, 256), seed=0))
    assert counts[0] == real["non_embedding"]
    assert torch.get_default_device().type == "cpu"
