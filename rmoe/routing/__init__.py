"""Routers: three stages, one contract, and the zoo. Names that need torch are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rmoe.routing.spec import BalanceSpec, Geometry, RouterSpec, TemperatureSpec
from rmoe.routing.zoo import ZOO, ZooRow, find, register, resolve, vary

if TYPE_CHECKING:  # what type checkers and the reference see of the names below
    from rmoe.routing.balance import balance_loss
    from rmoe.routing.contract import (
        RouterContext,
        RouterStats,
        Routing,
        State,
        dispatched_experts,
        gate_entropy,
        router_stats,
    )
    from rmoe.routing.noise import CounterNoise
    from rmoe.routing.router import BaseRouter, Router, SharedRouter, build_router, build_shared

_TORCH = {
    "Routing": "contract",
    "RouterContext": "contract",
    "RouterStats": "contract",
    "State": "contract",
    "dispatched_experts": "contract",
    "gate_entropy": "contract",
    "router_stats": "contract",
    "BaseRouter": "router",
    "Router": "router",
    "SharedRouter": "router",
    "build_router": "router",
    "build_shared": "router",
    "balance_loss": "balance",
    "CounterNoise": "noise",
}

__all__ = [
    "ZOO",
    "BalanceSpec",
    "BaseRouter",
    "CounterNoise",
    "Geometry",
    "Router",
    "RouterContext",
    "RouterSpec",
    "RouterStats",
    "Routing",
    "SharedRouter",
    "State",
    "TemperatureSpec",
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
    "vary",
]


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        return getattr(import_module(f"rmoe.routing.{_TORCH[name]}"), name)
    raise AttributeError(f"module 'rmoe.routing' has no attribute {name!r}")
