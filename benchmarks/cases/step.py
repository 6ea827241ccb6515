"""A whole training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import peers
from benchmarks.cases.registry import COMPILED, Contestants, Setting, case
from benchmarks.contestant import Contestant, Work
from benchmarks.sizes import FLOAT, Size

MODELS: dict[str, Callable[[Size], Any]] = {
    "smoe": partial(peers.ours, router="smoe"),
    "rmoe": partial(peers.ours, router="rmoe"),
    "OLMoE grouped_mm": partial(peers.olmoe, experts="grouped_mm"),
    "OLMoE eager": partial(peers.olmoe, experts="eager"),
    "Mixtral grouped_mm": partial(peers.mixtral, experts="grouped_mm"),
    "Mixtral eager": partial(peers.mixtral, experts="eager"),
    "smoe, per-expert loop": partial(peers.ours, router="smoe", experts="loop"),
    "rmoe, per-expert loop": partial(peers.ours, router="rmoe", experts="loop"),
    "dense, equal active parameters": peers.dense,
}
COMPILABLE = ("smoe", "rmoe", "OLMoE grouped_mm", "Mixtral grouped_mm")
"""`eager` experts loop over those that were hit: there is no compiling that whole."""


@case("step", "tests/model", products=True)
def step(setting: Setting) -> Contestants:
    """Forward, loss with balance, backward, fused AdamW.

    The least traffic: weights are read forward and backward and gradients written; then the optimizer reads
    weights, gradients and both moments, and writes weights and moments.
    """
    found = {name: _contestant(name, setting, compiled=False) for name in list(MODELS)[:2]}
    found |= {name + COMPILED: _contestant(name, setting, compiled=True) for name in COMPILABLE}
    found |= {name: _contestant(name, setting, compiled=False) for name in list(MODELS)[2:]}
    return found


def _contestant(name: str, setting: Setting, compiled: bool) -> Contestant:
    size = setting.size
    matrices = FLOAT * size.parameters()
    flops = size.step_flops("rmoe" if name.startswith("rmoe") else "smoe")
    if name.startswith("dense"):
        flops -= 3 * size.tokens * size.router_flops("smoe")
        matrices -= FLOAT * size.layers * (1 - size.top_k / size.experts) * size.expert_weights()

    def build() -> Callable[[], object]:
        return peers.training_step(MODELS[name](size), size, setting.device, compiled, setting.bf16)

    return Contestant(build, (Work(flops, 3 * matrices), Work(0.0, 7 * matrices)), size.tokens)


@case("dense gradients", "tests/model/test_dense_gradients.py")
def dense_gradients(setting: Setting) -> Contestants:
    """SMoE's step with a dense gradient for its router, beside the sparse step.

    DenseMixer computes every expert once more for every token, on the way back; Default MoE one product with the
    experts' mean outputs, and its gradient.
    """
    size = setting.size
    every = size.tokens * size.expert_flops() * size.experts / size.top_k
    means = 2 * size.tokens * size.layers * 2 * size.experts * size.hidden
    more = {"sparse": (None, 0.0), "densemixer": ("densemixer", every), "default": ("default", means)}
    matrices = FLOAT * size.parameters()

    def contestant(dense: str | None, extra: float) -> Contestant:
        def build() -> Callable[[], object]:
            model = peers.ours(size, "smoe", dense_gradients=dense)
            return peers.training_step(model, size, setting.device, False, setting.bf16)

        phases = Work(size.step_flops("smoe") + extra, 3 * matrices), Work(0.0, 7 * matrices)
        return Contestant(build, phases, size.tokens)

    return {name: contestant(*how) for name, how in more.items()}
