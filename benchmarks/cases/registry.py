"""Cases by name: who is measured, and which tests vouch for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.contestant import Contestant
from benchmarks.sizes import ON_CPU, ON_GPU, Size

COMPILED = ", compiled"
"""Ends the names of contestants that run through `torch.compile`."""


@dataclass(frozen=True)
class Setting:
    """One size on one device.

    Attributes:
        bf16: autocast for steps, bfloat16 weights for inference.
    """

    size: Size
    device: str = "cpu"
    bf16: bool = False


Contestants: TypeAlias = dict[str, Contestant]


@dataclass(frozen=True)
class Case:
    """A benchmark.

    Attributes:
        contestants: by name; the first is what the others' times are divided by.
        tests: without which its figures mean nothing.
        sized: False where models play no part.
        products: also say how much of a call is inside matrix products.
    """

    name: str
    contestants: Callable[[Setting], Contestants]
    tests: tuple[str, ...]
    sized: bool = True
    products: bool = False


CASES: dict[str, Case] = {}


def case(
    name: str, *tests: str, sized: bool = True, products: bool = False
) -> Callable[[Callable[[Setting], Contestants]], Callable[[Setting], Contestants]]:
    """Register a case; its function's docstring says what is measured."""

    def keep(contestants: Callable[[Setting], Contestants]) -> Callable[[Setting], Contestants]:
        CASES[name] = Case(name, contestants, tests, sized, products)
        return contestants

    return keep


def setting_for(size: str, device: str) -> Setting:
    """What is measured on this kind of device under a size's name."""
    gpu = device == "cuda"
    return Setting((ON_GPU if gpu else ON_CPU)[size], device, bf16=gpu)
