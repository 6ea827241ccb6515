"""Routers: three stages, one contract, and the zoo. A mechanism is one class with its options, `Config`, in it."""

from rmoe.routing.balance import BalanceSpec, balance_loss
from rmoe.routing.contract import (
    RouterContext,
    RouterStats,
    Routing,
    State,
    dispatched_experts,
    gate_entropy,
    router_stats,
)
from rmoe.routing.noise import Noise
from rmoe.routing.options import Geometry
from rmoe.routing.router import BaseRouter, Router, SharedRouter, build_router, build_shared
from rmoe.routing.spec import RouterSpec, vary, with_options
from rmoe.routing.zoo import ZOO, ZooRow, find, register, resolve, select

__all__ = [
    "ZOO",
    "BalanceSpec",
    "BaseRouter",
    "Geometry",
    "Noise",
    "Router",
    "RouterContext",
    "RouterSpec",
    "RouterStats",
    "Routing",
    "SharedRouter",
    "State",
    "ZooRow",
    "balance_loss",
    "build_router",
    "build_shared",
    "dispatched_experts",
    "find",
    "gate_entropy",
    "register",
    "resolve",
    "router_stats",
    "select",
    "vary",
    "with_options",
]
