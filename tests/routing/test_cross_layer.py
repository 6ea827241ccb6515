"""Routers that read the layers below: what padding may change, and what they refuse; the dense baseline."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import StaticCache

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, count_parameters, initialize
from rmoe.routing import Geometry, RouterContext, Routing, build_router, resolve, vary
from rmoe.routing.initial import fill

LAYERS, LENGTH, WIDTH, EXPERTS = 3, 7, 10, 4


def routed(name: str, inputs: torch.Tensor, mask: torch.Tensor | None) -> list[Routing]:
    """`[L, B, S, d]` through a router per layer."""
    routers = nn.ModuleList(
        build_router(resolve(name), Geometry(WIDTH, EXPERTS, 2, LAYERS, i, 5, 0.5)) for i in range(LAYERS)
    ).double()
    fill(routers, 3, 0.5)
    batch, length = inputs.shape[1:3]
    context = RouterContext(batch, length, None if mask is None else mask.reshape(-1))
    state, found = (), []
    for router, x in zip(routers, inputs, strict=True):
        routing, state = router(x.flatten(0, 1), state, None, context)
        found.append(routing)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["moepp-residual", "acmoe", "mcf-moe", "pre-gated"])
def test_padding_changes_no_real_token(name: str, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(LAYERS, 1, LENGTH, WIDTH, dtype=torch.float64, generator=generator)
    pads = torch.randn(LAYERS, 1, 3, WIDTH, dtype=torch.float64, generator=generator)
    flags = torch.ones(1, LENGTH, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)
    order = [0, 1] if side == "right" else [1, 0]
    inputs = torch.cat([(real, pads)[i] for i in order], 2)
    mask = torch.cat([flags[i] for i in order], 1)
    kept = mask.reshape(-1)
    for alone, padded in zip(routed(name, real, None), routed(name, inputs, mask), strict=True):
        assert (alone.logits - padded.logits[kept]).abs().max() < 1e-12
        assert torch.isfinite(padded.logits).all()


def test_neighbours_of_another_sequence_do_not_count() -> None:
    inputs = torch.randn(
        LAYERS, 2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    both = routed("mcf-moe", inputs, None)
    for i in range(2):
        one = routed("mcf-moe", inputs[:, i : i + 1], None)
        for a, b in zip(one, both, strict=True):
            assert (a.logits - b.logits.view(2, LENGTH, -1)[i]).abs().max() < 1e-12


def test_no_gradient_runs_through_the_metric() -> None:
    """With a fixed choice below, `ds/dx` of a token is `G M` and reaches no other token."""
    router = build_router(resolve("acmoe"), Geometry(WIDTH, EXPERTS, 2, 2, 1, 5, 0.5)).double()
    fill(router, 0, 0.5)
    x = torch.randn(
        6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    below = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0], [3.0]], dtype=torch.float64)
    routing, _ = router(x, (below,), None, RouterContext(1, 6))
    gradient = torch.autograd.grad(routing.logits[2].sum(), x)[0]
    assert (gradient[[0, 1, 3, 4, 5]] == 0).all()
    assert (gradient[2] != 0).all()


@pytest.mark.parametrize("name", ["acmoe", "mcf-moe"])
def test_no_text_without_the_other_tokens(name: str) -> None:
    net = net_of(name)
    ids = torch.randint(0, 30, (1, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RequestError, match=r"router\.kind"):
        net.generate(ids, max_new_tokens=2)


def test_a_cache_is_refused_by_who_reads_the_sequence() -> None:
    net = net_of("mcf-moe").eval()
    ids = torch.randint(0, 30, (1, 6), generator=torch.Generator().manual_seed(0))
    cache = net(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without a cache"):
        net(ids[:, :1], past_key_values=cache)
    static = StaticCache(config=net.config, max_cache_len=8)
    net(ids, past_key_values=static, use_cache=True)
    with pytest.raises(ValueError, match="without a cache"):
        net(ids[:, :1], past_key_values=static)


def test_packed_examples_are_refused_by_who_reads_the_sequence() -> None:
    net, ids = net_of("mcf-moe").eval(), torch.zeros(1, 6, dtype=torch.long)
    positions, mask = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([[1, 1, 1, 0, 0, 0]])
    with pytest.raises(ValueError, match="a row of its own"):
        net(ids, position_ids=positions, use_cache=False)
    net(ids, position_ids=positions, attention_mask=mask, use_cache=False)  # padding is no example


@pytest.mark.parametrize(
    ("options", "field"),
    [({"heads": 7}, "router.heads"), ({"local_top": 9}, "router.local_top"), ({"depth": 0}, "router.depth")],
)
def test_refused(options: dict, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        vary(resolve("mcf-moe"), router=options)


def net_of(router: str, **changes: int) -> RMoEForCausalLM:
    config = RMoEConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, moe_intermediate_size=6,
        num_experts=8, num_experts_per_tok=3, router=router, **changes,
    )  # fmt: skip
    net = RMoEForCausalLM(config)
    initialize(net, 1)
    return net


def test_dense_is_one_mlp_of_k_times_the_width() -> None:
    net = net_of("dense").double()
    block: nn.Module = net.model.layers[0].mlp
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    routing, _ = block.gate(x[0], (), None, RouterContext(1, 5))  # type: ignore[operator]
    gate, up = block.experts.gate_up_proj.chunk(2, 1)  # type: ignore[union-attr]
    down = block.experts.down_proj  # type: ignore[union-attr]
    wide = torch.nn.functional.silu(x @ gate.reshape(-1, 16).T) * (x @ up.reshape(-1, 16).T)
    want = wide @ down.permute(0, 2, 1).reshape(-1, 16)
    assert (block(x, routing) - want).abs().max() < 1e-12


def test_dense_has_the_active_parameters_of_the_others() -> None:
    dense, smoe = count_parameters(net_of("dense")), count_parameters(net_of("smoe"))
    assert dense["total"] == dense["active"] == smoe["active"] - smoe["router"]
    assert dense["router"] == 0
