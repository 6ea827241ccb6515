"""How large a row's logits are before training: its routers alone, on inputs of unit scale."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from rmoe.routing.contract import RouterContext, State, logit_variance
from rmoe.routing.initial import fill, keyed_generator
from rmoe.routing.options import Geometry
from rmoe.routing.router import Router, build_router, build_shared
from rmoe.routing.spec import RouterSpec

TOKENS = 512


class _Routers(nn.Module):
    """All routers of a model, without the model."""

    def __init__(self, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__()
        self.router_shared = build_shared(spec, geometry)
        layers = (replace(geometry, layer_index=index) for index in range(geometry.num_layers))
        self.layers = nn.ModuleList(build_router(spec, layer) for layer in layers)


@torch.no_grad()
def initial_logit_std(spec: RouterSpec, geometry: Geometry, seed: int = 0) -> float | None:
    """Standard deviation of the raw logits over experts, root mean square over tokens, mean over layers.

    Every layer reads tokens of its own, normal with a root mean square of 1, as after a model's norm.

    Returns:
        None for a router that has no scorer.
    """
    routers = _Routers(spec, geometry).eval()
    fill(routers, seed, geometry.initializer_range)
    if not all(isinstance(router, Router) for router in routers.layers):
        return None
    state: State = ()
    context = RouterContext(1, TOKENS, None, torch.zeros(TOKENS, dtype=torch.int64))
    found = []
    for index, router in enumerate(routers.layers):
        x = torch.randn(TOKENS, geometry.hidden_size, generator=keyed_generator(seed, f"inputs/{index}"))
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        routing, state = router(x, state, routers.router_shared, context)
        found.append(float(logit_variance(routing.logits).mean().sqrt()))
    return sum(found) / len(found)
