"""Routers: three stages, one contract, and the zoo. Names that need torch are imported on first use."""

from importlib import import_module
from typing import Any

from rmoe.routing.spec import BalanceSpec, Geometry, RouterSpec, TemperatureSpec
from rmoe.routing.zoo import ZOO, ZooRow, find, register, resolve, vary

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
    "Geometry",
    "RouterSpec",
    "TemperatureSpec",
    "ZooRow",
    "find",
    "register",
    "resolve",
    "vary",
    *sorted(_TORCH),
]


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        return getattr(import_module(f"rmoe.routing.{_TORCH[name]}"), name)
    raise AttributeError(f"module 'rmoe.routing' has no attribute {name!r}")
