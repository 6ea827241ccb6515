"""How every parameter of a model starts (`rmoe.routing.initial.fill` draws it), and how many there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rmoe.compat import is_loaded
from rmoe.routing.initial import fill, initializers_of, own_tensors
from rmoe.routing.step_state import StepState


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from a generator keyed by (seed, parameter name); see `fill`.

    Args:
        model: an RMoE model.
        seed: any integer.

    Raises:
        ValueError: a parameter that no rule covers.
    """
    fill(model, seed, model.config.initializer_range)  # type: ignore[union-attr, arg-type]


@torch.no_grad()
def initialize_missing(module: nn.Module, std: float) -> None:
    """First values for a module's own parameters and buffers that no checkpoint has filled."""
    rules = initializers_of(module, std)
    for name, tensor in own_tensors(module, rules):
        if not is_loaded(tensor):
            rules[name](tensor, None)
    if isinstance(module, StepState):
        module.restart(is_loaded)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of an RMoE model, frozen ones included.

    Returns:
        `total`; `non_embedding`, without the embedding and the output matrix; `router`, projectors, cells, scorers;
        `active`, without the experts a token does not visit.
    """
    counts = dict.fromkeys(("total", "non_embedding", "router", "active"), 0)
    config: Any = model.config
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, tensor in own_tensors(module, initializers_of(module, 0.02)):
            if id(tensor) in seen:  # tied
                continue
            seen.add(id(tensor))
            size, path = tensor.numel(), f"{prefix}.{name}"
            is_expert = ".mlp.experts." in path
            counts["total"] += size
            counts["non_embedding"] += 0 if "embed_tokens" in path or "lm_head" in path else size
            counts["router"] += size if ".mlp.gate." in path or "router_shared." in path else 0
            counts["active"] += (
                size * config.num_experts_per_tok // config.num_built_experts if is_expert else size
            )
    return counts
