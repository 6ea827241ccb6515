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
from benchmarks.contestant import Contestant, Work
from benchmarks.sizes import FLOAT, Size

PATHS: dict[str, str] = {
    "auto": "auto",
    "sorted_mm": "sorted_mm",
    "transformers grouped_mm": "grouped_mm",
    "transformers eager": "eager",
}


@case("block", "tests/model/test_experts.py", products=True)
def block(setting: Setting) -> Contestants:
    """One layer's experts, forward and backward, on one random decision.

    The least traffic: weights are read forward and backward and their gradients written.
    """
    size = replace(setting.size, layers=1)
    work = Work(3.0 * size.tokens * size.expert_flops(), 3.0 * FLOAT * size.expert_weights())
    return _contestants(setting, size, work, grad=True) | {
        "per-expert loop": Contestant(
            partial(_run, peers.LoopExperts, size, setting, grad=True), (work,), size.tokens
        )
    }


def _few(tokens: int, setting: Setting) -> Contestants:
    """The same without gradients for the tokens of one decoding step, which choose independently.

    The least traffic: the weights that so many tokens are sure to need.
    """
    size = replace(setting.size, layers=1, batch=tokens, length=1)
    read = 1 - (1 - size.top_k / size.experts) ** tokens
    work = Work(1.0 * tokens * size.expert_flops(), FLOAT * read * size.expert_weights())
    return _contestants(setting, size, work, grad=False)


for _tokens in (1, 8, 64):
    case(f"block {_tokens}", "tests/model/test_experts.py")(partial(_few, _tokens))


def _contestants(setting: Setting, size: Size, work: Work, grad: bool) -> Contestants:
    return {
        name: Contestant(
            partial(_run, partial(_experts, implementation=path), size, setting, grad), (work,), size.tokens
        )
        for name, path in PATHS.items()
    }


def _experts(size: Size, implementation: str) -> nn.Module:
    experts: nn.Module = peers.ours(size, "smoe", implementation).model.layers[0].mlp.experts
    return experts


def _run(make: Callable[[Size], nn.Module], size: Size, setting: Setting, grad: bool) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(size.tokens, size.experts, generator=generator).topk(size.top_k, -1).indices
    weights = torch.rand(size.tokens, size.top_k, generator=generator).to(setting.device)
    hidden, index = hidden_states(replace(setting, size=size)), index.to(setting.device)
    experts = make(size).to(setting.device)

    @torch.set_grad_enabled(grad)
    def call() -> None:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
            out = experts(hidden, index, weights)
        if grad:
            out.sum().backward()
            experts.zero_grad(set_to_none=True)
            hidden.grad = None

    return call
