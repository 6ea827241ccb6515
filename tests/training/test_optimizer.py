"""AdamW's groups and rates are those that transformers' Trainer would give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from rmoe.training.build import build_model, model_config, router_parameters
from rmoe.training.config import RunConfig, TrainingConfig
from rmoe.training.optimizer import adamw, schedule
from rmoe.training.state import group_names

PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def small(**model: object) -> nn.Module:
    config = RunConfig()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "moe_intermediate_size": 8}
    config = replace(config, model=replace(config.model, num_experts=4, **sizes, **model))
    return build_model(model_config(config, 64), 0)


def olmoe() -> nn.Module:
    return OlmoeForCausalLM(
        OlmoeConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=2, num_experts=4)
    )  # fmt: skip


class Odd(nn.Module):
    """Names that only look like norms and biases, and a LayerNorm that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.normal, self.after, self.q_norm = nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)
        self.gate_bias = nn.Parameter(torch.zeros(2))
        self.inner = nn.ModuleDict({"norm": nn.Linear(2, 2), "abnorm": nn.Linear(2, 2, bias=False)})


@pytest.mark.parametrize(
    "build", [small, lambda: small(norm_type="layernorm", norm_position="post"), olmoe, Odd]
)
def test_what_decays_is_what_decays_under_trainer(build) -> None:
    model = build()
    decayed = set(get_parameter_names(model, [nn.LayerNorm], PATTERNS))
    names = group_names(adamw(model, TrainingConfig(weight_decay=0.1), []), model)
    every = [name for name, _ in model.named_parameters()]
    assert names == [[n for n in every if n in decayed], [n for n in every if n not in decayed]]
    assert all(names)


def test_frozen_parameters_are_in_no_group() -> None:
    model = olmoe()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert group_names(adamw(model, TrainingConfig(), []), model) == [["lm_head.weight"], []]


def test_settings_reach_the_optimizer() -> None:
    model = small()
    training = TrainingConfig(
        learning_rate=2e-3, router_learning_rate=5e-3, weight_decay=0.3,
        adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
    )  # fmt: skip
    routers = router_parameters(model)
    optimizer = adamw(model, training, list(routers.values()))
    groups = zip(optimizer.param_groups, group_names(optimizer, model), strict=True)
    found = [(g["lr"], g["weight_decay"], set(names) <= routers.keys()) for g, names in groups]
    assert (
        found == [(2e-3, 0.3, False), (2e-3, 0.0, False), (5e-3, 0.3, True), (5e-3, 0.0, True)][: len(found)]
    )
    assert len(found) >= 3
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.95), 1e-7, True)


SHAPES = {
    "constant": {1: 0.0, 2: 0.5, 3: 1.0, 10: 1.0, 20: 1.0},
    "linear": {1: 0.0, 2: 0.5, 3: 1.0, 12: 0.55, 20: 0.15},
    "cosine": {1: 0.0, 2: 0.5, 3: 1.0, 12: 0.55, 20: 0.1068369},
    "wsd": {1: 0.1, 2: 0.55, 3: 1.0, 17: 1.0, 18: 0.775, 20: 0.325},
}


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_the_lowest_rate_may_be_the_peak(name: str) -> None:
    training = TrainingConfig(
        max_steps=10, learning_rate=2.0, min_learning_rate=2.0, warmup_steps=0, schedule=name
    )
    optimizer = adamw(nn.Linear(2, 2), training, [])
    rates = schedule(optimizer, training, 10)
    for _ in range(9):
        optimizer.step()
        rates.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_routers_end_at_the_same_share_of_their_peak(name: str) -> None:
    training = TrainingConfig(
        max_steps=10,
        learning_rate=2.0,
        min_learning_rate=0.2,
        router_learning_rate=3.0,
        warmup_steps=0,
        schedule=name,
    )
    model = nn.Linear(2, 2)
    optimizer = adamw(model, training, [model.weight])
    rates = schedule(optimizer, training, 10)
    for _ in range(10):
        optimizer.step()
        rates.step()
    assert {round(group["lr"], 6) for group in optimizer.param_groups if group["params"]} == {0.2, 0.3}


@pytest.mark.parametrize("name", SHAPES)
def test_rates(name: str) -> None:
    """Shares of the peak at steps counted from 1: two steps of warm-up, a tenth at the end (and where `wsd` begins)."""
    training = TrainingConfig(
        max_steps=20, learning_rate=2.0, min_learning_rate=0.2, warmup_steps=2, schedule=name
    )
    optimizer = adamw(nn.Linear(2, 2), training, [])
    rates = schedule(optimizer, training, 20)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        assert rates.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        rates.step()
    assert {step: found[step - 1] for step in SHAPES[name]} == pytest.approx(SHAPES[name], abs=1e-6)
