"""Rows of the zoo against transformers' own classes, with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, OlmoeConfig, ZayaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.zaya.modeling_zaya import ZayaRouter

from rmoe.errors import RequestError
from rmoe.model.configuration_rmoe import RMoEConfig
from rmoe.model.layers import RMoESparseMoeBlock
from rmoe.routing import Geometry, RouterContext, build_router, resolve, vary
from rmoe.routing.gate import Softmax
from rmoe.routing.losses import LoadBalance
from rmoe.routing.zoo import find


class TorchNoise:
    """Noise from torch's default generator, in the order other implementations draw it."""

    def for_layer(self, layer: int) -> TorchNoise:
        return self

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(like)

    def exponential(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like).exponential_()

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(like)


def fill(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)


@pytest.mark.parametrize("renormalize", [True, False])
def test_smoe_is_olmoe(renormalize: bool) -> None:
    theirs_config = OlmoeConfig(
        hidden_size=24, intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=renormalize
    )
    theirs_config._experts_implementation = "eager"
    theirs = OlmoeSparseMoeBlock(theirs_config)
    fill(theirs)
    config = RMoEConfig(
        hidden_size=24, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=renormalize,
        router="smoe",
    )  # fmt: skip
    config._experts_implementation = "eager"
    ours = RMoESparseMoeBlock(config, 0)
    ours.gate.scorer.linear.weight.data = theirs.gate.weight.data
    ours.experts.load_state_dict(theirs.experts.state_dict())
    x = torch.randn(3, 7, 24)
    routing, _ = ours.gate(x.view(-1, 24), (), None, RouterContext(3, 7))
    assert (ours(x, routing) - theirs(x)).abs().max() < 1e-6


def test_eda_is_zaya() -> None:
    config = ZayaConfig(hidden_size=24, num_experts=6, num_experts_per_tok=1, router_hidden_size=10)
    spec = vary(resolve("eda"), recurrence={"width": 10})
    x = torch.randn(2, 9, 24)
    theirs_state, state = None, ()
    for layer in range(3):
        theirs = ZayaRouter(config, layer)
        fill(theirs)
        theirs.balancing_biases.normal_(0, 0.05)
        ours = build_router(spec, Geometry(24, 6, 1, num_layers=3, layer_index=layer))
        ours.recurrence.projector.load_state_dict(theirs.down_proj.state_dict())
        if layer > 0:
            ours.recurrence.cell.scale.data = theirs.router_states_scale.data
        head = theirs.router_mlp
        for mine, other in (
            ("norm", head.norm),
            ("fc1", head.fc1),
            ("fc2", head.fc2),
            ("out", head.out_proj),
        ):
            getattr(ours.scorer, mine).load_state_dict(other.state_dict())
        ours.scorer.norm.eps = config.rms_norm_eps
        ours.selection_bias.bias.copy_(theirs.balancing_biases)
        logits, weights, experts, theirs_state = theirs(x, theirs_state)
        routing, state = ours(x.view(-1, 24), state, None, RouterContext(2, 9))
        assert (routing.logits - logits).abs().max() < 1e-6
        assert (routing.weights - weights).abs().max() < 1e-6
        skipped = routing.experts == 6
        assert torch.equal(routing.experts.masked_fill(skipped, 0), experts)
        assert (state[0] - theirs_state.view(-1, 10)).abs().max() < 1e-6


def test_eda_skips_when_its_bias_says_so() -> None:
    router = build_router(resolve("eda"), Geometry(24, 6, 2))
    fill(router)
    router.selection_bias.bias[-1] = 2.0
    routing, _ = router(torch.randn(11, 24), (), None, RouterContext(1, 11))
    assert (routing.experts[:, 0] == 6).all()
    assert (routing.weights[:, 0] == 0).all()
    assert (routing.weights[:, 1] > 0).all()


@pytest.mark.parametrize(("groups", "top_groups", "scale"), [(1, 1, 1.0), (4, 2, 2.5)])
def test_deepseek_v3(groups: int, top_groups: int, scale: float) -> None:
    config = DeepseekV3Config(
        hidden_size=24, moe_intermediate_size=8, n_routed_experts=16, num_experts_per_tok=4, n_group=groups,
        topk_group=top_groups, routed_scaling_factor=scale, norm_topk_prob=True,
    )  # fmt: skip
    theirs = DeepseekV3MoE(config)
    fill(theirs.gate)
    theirs.gate.e_score_correction_bias.normal_(0, 0.1)
    gate = {"groups": groups, "top_groups": top_groups, "scale": scale}
    ours = build_router(vary(resolve("deepseek-v3"), gate=gate), Geometry(24, 16, 4))
    ours.scorer.linear.weight.data = theirs.gate.weight.data
    ours.selection_bias.bias.copy_(theirs.gate.e_score_correction_bias)
    x = torch.randn(33, 24)
    routed = theirs.gate(x)
    if isinstance(routed, tuple):  # newer transformers choose in the router, older ones in the block
        logits, weights, experts = routed
    else:
        logits = routed
        experts, weights = theirs.route_tokens_to_experts(logits)
    routing, _ = ours(x, (), None, RouterContext(1, 33))
    assert (routing.logits - logits).abs().max() < 1e-6
    order, theirs_order = routing.experts.argsort(-1), experts.argsort(-1)
    assert torch.equal(routing.experts.gather(-1, order), experts.gather(-1, theirs_order))
    assert (routing.weights.gather(-1, order) - weights.gather(-1, theirs_order)).abs().max() < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_sparsemixer_is_phimoe(training: bool) -> None:
    router = build_router(resolve("sparsemixer"), Geometry(24, 8, 2))
    fill(router)
    x = torch.randn(200, 24, requires_grad=True)
    torch.manual_seed(3)
    routing, _ = router(x, (), None, RouterContext(1, 200, noise=TorchNoise() if training else None))
    (routing.weights * torch.arange(1.0, 401).view(200, 2)).sum().backward()
    ours_grad = x.grad.clone()
    x.grad = None
    torch.manual_seed(3)
    weights, experts = sparsemixer(router.scorer(x, None, None), 0.01, training)
    (weights * torch.arange(1.0, 401).view(200, 2)).sum().backward()
    assert torch.equal(routing.experts, experts)
    assert (routing.weights - weights).abs().max() < 1e-6
    assert (ours_grad - x.grad).norm() / x.grad.norm() < 1e-6


def test_the_aux_loss_differs_from_transformers_by_the_stated_factor() -> None:
    """transformers counts assignments per token (k times ours) and pools the layers; on one layer that is all."""
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    from rmoe.routing import balance_loss
    from rmoe.routing.balance import BalanceSpec

    x = torch.randn(40, 24)
    for count, factor in (("tokens", 1), ("assignments", 3)):
        balance = BalanceSpec(losses=(LoadBalance(weight=1.0, count=count),))
        router = build_router(
            vary(resolve("smoe"), gate=Softmax.Config(), balance=balance), Geometry(24, 8, 3)
        )
        fill(router)
        context = RouterContext(1, 40)
        routing, _ = router(x, (), None, context)
        ours = balance_loss([router], [routing], context, 0.01)
        theirs = load_balancing_loss_func((routing.logits,), 8, 3)
        assert abs(float(ours) * factor - float(theirs)) < 1e-5


@pytest.mark.parametrize("name", ["deepseek-v3", "kolibri", "llama-4", "flint", "expert-threshold", "dynmoe"])
def test_sigmoids_that_are_all_nothing_give_no_nan(name):
    router = build_router(
        find(name).spec, Geometry(hidden_size=8, num_experts=4, top_k=find(name).top_k or 2)
    )
    gate = router.gate.eval()
    routing = gate(torch.full((3, 4), -200.0), None, RouterContext(1, 3))
    for values in (routing.probs, routing.weights):
        assert values.isfinite().all()


@pytest.mark.parametrize(
    "option", [{"scale": 3.0}, {"multiplier": 10.0}, {"softcap": 5.0}, {"expert_scale": True}]
)
def test_gate_options_that_inkling_does_not_read_are_refused(option):
    with pytest.raises(RequestError, match=r"gate\.\w+ is .* with router"):
        build_router(vary(resolve("inkling"), gate=option), Geometry(hidden_size=8, num_experts=4, top_k=2))
