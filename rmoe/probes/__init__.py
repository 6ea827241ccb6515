"""Router probes: tasks with a known optimum. They tell in minutes what a router can do."""

from importlib import import_module
from typing import Any

from rmoe.results.probes import Knobs, ProbeRow, knobs_with, read_rows

_TORCH = {"PROBES": "suite", "Probe": "suite", "World": "world", "run": "runner"}

__all__ = ["Knobs", "ProbeRow", "knobs_with", "read_rows", *sorted(_TORCH)]


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        return getattr(import_module(f"rmoe.probes.{_TORCH[name]}"), name)
    raise AttributeError(f"module 'rmoe.probes' has no attribute {name!r}")
