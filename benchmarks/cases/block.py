"""One layer's experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks import peers
from benchmarks.cases.registry import Contestants, Setting, case
from benchmarks.cases.router import hidden_states
from benchmarks.measure import Contestant, Work
from benchmarks.sizes import FLOAT, Size


@case("block", "tests/model/test_experts.py", products=True)
def block(setting: Setting) -> Contestants:
    """One layer's experts, forward and backward, on one random decision.

    The least traffic: weights are read forward and backward and their gradients written.
    """
    size = replace(setting.size, layers=1)
    work = Work(3.0 * size.tokens * size.expert_flops(), 3.0 * FLOAT * size.expert_weights())
    made: dict[str, Callable[[Size], nn.Module]] = {
        "auto": partial(_experts, implementation="auto"),
        "sorted_mm": partial(_experts, implementation="sorted_mm"),
        "transformers grouped_mm": partial(_experts, implementation="grouped_mm"),
        "transformers eager": partial(_experts, implementation="eager"),
        "per-expert loop": peers.LoopExperts,
    }
    return {
        name: Contestant(partial(_run, make, size, setting), (work,), size.tokens)
        for name, make in made.items()
    }


def _experts(size: Size, implementation: str) -> nn.Module:
    experts: nn.Module = peers.ours(size, "smoe", implementation).model.layers[0].mlp.experts
    return experts


def _run(make: Callable[[Size], nn.Module], size: Size, setting: Setting) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(size.tokens, size.experts, generator=generator).topk(size.top_k, -1).indices
    weights = torch.rand(size.tokens, size.top_k, generator=generator).to(setting.device)
    hidden, index = hidden_states(setting), index.to(setting.device)
    experts = make(size).to(setting.device)

    def call() -> None:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
            out = experts(hidden, index, weights)
        out.sum().backward()
        experts.zero_grad(set_to_none=True)
        hidden.grad = None

    return call
