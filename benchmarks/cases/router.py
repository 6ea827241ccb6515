"""The router stage alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import ZayaConfig
from transformers.models.zaya.modeling_zaya import ZayaRouter

from benchmarks.cases.registry import COMPILED, Contestants, Setting, case
from benchmarks.contestant import Contestant, Work
from benchmarks.sizes import FLOAT
from rmoe.routing.contract import RouterContext, State
from rmoe.routing.options import Geometry
from rmoe.routing.router import build_router, build_shared
from rmoe.routing.zoo import resolve

ZAYA = "ZAYA1 (transformers, k = 1)"


@case("router", "tests/routing", "tests/contract/test_contract.py", products=True)
def router(setting: Setting) -> Contestants:
    """All layers' routers, forward and backward, on random hidden states.

    The least traffic: the stream is read forward and backward, and its gradient written.
    """
    size = setting.size
    stream = 3.0 * FLOAT * size.layers * size.tokens * size.hidden

    def work(name: str) -> tuple[Work, ...]:
        return (Work(3.0 * size.tokens * size.router_flops(name), stream),)

    found: Contestants = {
        name: Contestant(partial(_route, name, setting), work(name)) for name in ("smoe", "rmoe", "eda")
    }
    found["rmoe" + COMPILED] = Contestant(partial(_route, "rmoe", setting, compiled=True), work("rmoe"))
    # Its parameters are those of our row `eda`, which is the same router.
    return found | {ZAYA: Contestant(partial(_route_zaya, setting), work("eda"))}


def hidden_states(setting: Setting) -> Tensor:
    """`[T, d]`, a leaf that wants a gradient."""
    size = setting.size
    hidden = torch.randn(size.tokens, size.hidden, generator=torch.Generator().manual_seed(0))
    return hidden.to(setting.device).requires_grad_()


def _route(name: str, setting: Setting, compiled: bool = False) -> Callable[[], object]:
    size, spec = setting.size, resolve(name)

    def geometry(layer: int) -> Geometry:
        return Geometry(size.hidden, size.experts, size.top_k, num_layers=size.layers, layer_index=layer)

    shared = build_shared(spec, geometry(0))
    routers = nn.ModuleList(build_router(spec, geometry(i)) for i in range(size.layers))
    everything = nn.ModuleList([routers, *([] if shared is None else [shared])]).to(setting.device)
    for parameter in everything.parameters():
        nn.init.normal_(parameter, 0.0, 0.05)
    hidden, context = hidden_states(setting), RouterContext(size.batch, size.length)

    def forward() -> Tensor:
        state: State = ()
        total = hidden.new_zeros(())
        for layer in routers:
            routing, state = layer(hidden, state, shared, context)
            total = total + routing.weights.square().sum() + routing.probs.square().sum()
        return total

    run = torch.compile(forward) if compiled else forward
    return lambda: run().backward()


def _route_zaya(setting: Setting) -> Callable[[], object]:
    """transformers refuses ZAYA1 with k above 1."""
    size = setting.size
    config = ZayaConfig(
        hidden_size=size.hidden, num_experts=size.experts, num_experts_per_tok=1, router_hidden_size=256
    )
    routers = nn.ModuleList(ZayaRouter(config, i) for i in range(size.layers)).to(setting.device)
    hidden = hidden_states(setting)

    def step() -> None:
        state, total = None, hidden.new_zeros(())
        for layer in routers:
            logits, weights, _, state = layer(hidden.view(size.batch, size.length, -1), state)
            total = total + weights.square().sum() + logits.softmax(-1).square().sum()
        total.backward()

    return step
