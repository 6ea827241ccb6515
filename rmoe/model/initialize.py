"""How every parameter starts, and who draws it.

transformers draws from one generator in module order, so one projector more changes every weight after it, and two
routers would not start from the same model. Here each parameter has a generator keyed by (seed, name).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rmoe.routing.initial import Initialized, Initializer, constant, normal
from rmoe.routing.training_state import TrainingState


def initializers_of(module: nn.Module, std: float) -> dict[str, Initializer]:
    """How a module's own parameters start: as it says, else by its kind (weights normal, biases 0, norms 1)."""
    if isinstance(module, Initialized) or hasattr(module, "initializers"):
        return module.initializers()  # type: ignore[operator,union-attr]
    if isinstance(module, nn.Linear | nn.Embedding):
        return {"weight": normal(std), "bias": constant(0.0)}
    if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
        return {"weight": constant(1.0), "bias": constant(0.0)}
    return {}


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from a generator keyed by (seed, parameter name).

    Parameters of the same name and shape are then equal for every pair of routers. Values are drawn in float32 on the
    CPU and copied, so the device does not matter.

    Args:
        model: an RMoE model.
        seed: any integer.

    Raises:
        ValueError: a parameter that no rule covers.
    """
    std = model.config.initializer_range  # type: ignore[union-attr]
    for prefix, module in model.named_modules():
        rules = initializers_of(module, std)  # type: ignore[arg-type]
        missing = dict(module.named_parameters(recurse=False)).keys() - rules.keys()
        if missing:
            raise ValueError(f"no initial value is defined for {sorted(missing)} of {prefix}")
        for name, tensor in own_tensors(module, rules):
            value = torch.empty(tensor.shape, dtype=torch.float32)
            rules[name](value, keyed_generator(seed, f"{prefix}.{name}" if prefix else name))
            tensor.copy_(value)


@torch.no_grad()
def initialize_missing(module: nn.Module, std: float) -> None:
    """First values for a module's own parameters and buffers that no checkpoint has filled."""
    rules = initializers_of(module, std)
    for name, tensor in own_tensors(module, rules):
        if not _is_loaded(tensor):
            rules[name](tensor, None)
    if isinstance(module, TrainingState):
        module.restart(_is_loaded)


def _is_loaded(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_hf_initialized", False))


def own_tensors(module: nn.Module, rules: dict[str, Initializer]) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters, and frozen ones held as buffers, that have a rule."""
    for name in rules:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            yield name, tensor


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
            counts["active"] += size * config.num_experts_per_tok // config.num_experts if is_expert else size
    return counts


def keyed_generator(seed: int, name: str) -> Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
