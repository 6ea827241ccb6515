"""What a configuration refuses, what it resolves, and how big the models of the paper come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, count_parameters, initialize
from rmoe.routing import resolve
from tests.model.small import config

MEDIUM = {
    "hidden_size": 352, "num_hidden_layers": 8, "num_attention_heads": 8, "num_experts": 16, "num_experts_per_tok": 2,
    "moe_intermediate_size": 352, "mlp_gated": False, "hidden_act": "relu", "norm_position": "post",
    "norm_type": "layernorm",
}  # fmt: skip


@pytest.mark.parametrize(("router", "parameters"), [("smoe", 45_056), ("rmoe", 475_904)])
def test_router_parameters_of_medium(router: str, parameters: int) -> None:
    with torch.device("meta"):
        net = RMoEForCausalLM(RMoEConfig(router=router, **MEDIUM))
    assert count_parameters(net)["router"] == parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "rmoee"}, "router is 'rmoee'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed: 1 to num_experts (5)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"norm_position": "middle"}, "norm_position is 'middle'; allowed: 'pre' or 'post'"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
        ({"router": {"recurrence": {"kind": "cell", "width": 0}}}, "recurrence.width is 0"),
        ({"router": {"recurrence": {"kind": "cell", "widht": 8}}}, "recurrence.widht is 8"),
        ({"router": {"recurrence": {"kind": "cell", "width": "8"}}}, "recurrence.width is '8'; allowed: int"),
        ({"router": {"gates": {}}}, "router.gates"),
        ({"router": {"gate": {"kind": "hard"}}}, "gate.kind is 'hard'"),
        ({"router": "deepseek-v3-groups"}, "gate.groups is 4; allowed: a divisor of num_experts (5)"),
        ({"router": "switch"}, None),
        ({"router": "stable-moe"}, "num_experts_per_tok is 2; allowed: 1 with router stable"),
        ({"router": "sparsemixer", "num_experts_per_tok": 1}, "num_experts_per_tok is 1; allowed: 2"),
        (
            {"router": {"temperature": {"kind": "temperature", "target_entropy": 2.0}}},
            "temperature.target_entropy is 2.0",
        ),
    ],
)
def test_refusals_name_field_value_and_allowed(changes: dict, message: str | None) -> None:
    if message is None:
        config(**changes)
        return
    with pytest.raises(RequestError) as caught:
        config(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_norm_topk_prob_and_the_gate_cannot_disagree() -> None:
    assert config(norm_topk_prob=False).router["gate"]["renormalize"] is False
    assert config(router="eda").norm_topk_prob is False
    assert config().norm_topk_prob is True


def test_the_router_and_norm_topk_prob_set_later_say_one_thing(tmp_path: Path) -> None:
    def saved(built: RMoEConfig) -> RMoEConfig:
        built.save_pretrained(tmp_path)
        again = RMoEConfig.from_pretrained(tmp_path)
        assert (again.router, again.norm_topk_prob) == (built.router, built.router["gate"]["renormalize"])
        return again

    built = config(router="smoe")
    built.norm_topk_prob = False
    assert saved(built).router["gate"]["renormalize"] is False
    built.router = "rmoe"
    assert saved(built).norm_topk_prob is True
    built.router["gate"]["renormalize"] = False  # in place
    assert saved(built).norm_topk_prob is False
    config(router="smoe").save_pretrained(tmp_path)
    for changes, kept in (({"router": "olmoe"}, False), ({"norm_topk_prob": False}, False), ({}, True)):
        again = RMoEConfig.from_pretrained(tmp_path, **changes)
        assert again.norm_topk_prob is again.router["gate"]["renormalize"] is kept


def test_fields_set_after_the_checks_are_checked_when_a_model_is_built() -> None:
    built = config()
    built.norm_position = "after"
    with pytest.raises(RequestError, match="norm_position is 'after'"):
        RMoEForCausalLM(built)


def test_what_is_refused_does_not_stay() -> None:
    for name, value in (("erc_loss_coef", 0.1), ("router", "olmoee")):
        config = RMoEConfig(router="rmoe" if name == "erc_loss_coef" else "smoe")
        before = config.to_dict()
        with pytest.raises(RequestError):
            setattr(config, name, value)
        assert config.to_dict() == before
    config.router = "olmoe"  # after a name that was wrong
    assert config.norm_topk_prob is False


def test_the_router_is_stored_resolved() -> None:
    built = config(router="rmoe")
    assert built.router_spec == resolve("rmoe")
    assert RMoEConfig.from_dict(built.to_dict()).router_spec == resolve("rmoe")


def test_equal_names_start_equal() -> None:
    """Every parameter of the same name and shape is the same for every two routers, and differs by seed."""
    first, second, other = (RMoEForCausalLM(config(router=r)) for r in ("smoe", "rmoe", "smoe"))
    initialize(first, 7)
    initialize(second, 7)
    initialize(other, 8)
    mine, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    same = [n for n in mine if n in theirs and mine[n].shape == theirs[n].shape]
    assert len(same) >= len(mine) - 2
    assert all(torch.equal(mine[n], theirs[n]) for n in same)
    assert not torch.equal(dict(other.named_parameters())["lm_head.weight"], mine["lm_head.weight"])


def test_default_initialisation_follows_the_same_rules() -> None:
    torch.manual_seed(0)
    net = RMoEForCausalLM(config(router="rmoe", hidden_size=48, head_dim=8, initializer_range=0.05))
    scorer = net.routers[0].scorer.linear.weight
    assert abs(float(scorer.detach().std()) / 128**-0.5 - 1) < 0.15
    assert abs(float(net.lm_head.weight.detach().std()) / 0.05 - 1) < 0.1
    assert (net.model.norm.weight == 1).all()
