"""What a router costs: parameters, and FLOPs per token as torch counts them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from rmoe.routing.contract import RouterContext, State
from rmoe.routing.initial import Initialized
from rmoe.routing.options import Geometry
from rmoe.routing.router import build_router, build_shared
from rmoe.routing.spec import RouterSpec

MEDIUM = Geometry(hidden_size=352, num_experts=16, top_k=2, num_layers=8, vocab_size=256)
"""The sizes of the paper's medium model (36M)."""


class RouterCost(NamedTuple):
    """Attributes:
    parameters: of all layers' routers and what they share, frozen ones included.
    flops_per_token: matrix products of one forward pass through all routers, two per multiply-add.
    """

    parameters: int
    flops_per_token: int


def router_cost(spec: RouterSpec, geometry: Geometry = MEDIUM) -> RouterCost:
    """Parameters and FLOPs of a model's routers, on the meta device.

    FLOPs are counted on real calls with one and with two sequences of 64 tokens; the difference leaves out what does
    not depend on them (a hypernetwork runs once per forward pass).

    >>> from rmoe.routing.zoo import resolve
    >>> router_cost(resolve("rmoe")).parameters
    475904
    """
    with torch.device("meta"):
        shared = build_shared(spec, geometry)
        routers = [build_router(spec, replace(geometry, layer_index=i)) for i in range(geometry.num_layers)]

        def flops(tokens: int) -> int:
            hidden = torch.empty(tokens, geometry.hidden_size)
            ids = torch.zeros(tokens, dtype=torch.int64)
            state: State = ()
            with FlopCounterMode(display=False) as counter:
                for router in routers:
                    _, state = router(hidden, state, shared, RouterContext(tokens // 64, 64, None, ids))
            return counter.get_total_flops()

        per_token = (flops(128) - flops(64)) // 64
    modules = [m for root in (shared, *routers) if root is not None for m in root.modules()]
    frozen = sum(
        b.numel() for m in modules if isinstance(m, Initialized) for _, b in m.named_buffers(recurse=False)
    )
    trained = sum(p.numel() for m in modules for p in m.parameters(recurse=False))
    return RouterCost(trained + frozen, per_token)
