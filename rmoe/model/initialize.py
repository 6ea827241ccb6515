"""How every parameter starts, and who draws it.

transformers draws from one generator in module order, so one projector more changes every weight after it, and two
routers would not start from the same model. Here each parameter has a generator keyed by (seed, name).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, nn

from rmoe.routing.initial import Initialized, Initializer, constant, normal


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
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            if name not in rules:
                raise ValueError(f"no initial value is defined for parameter {full_name}")
            value = torch.empty(parameter.shape, dtype=torch.float32)
            rules[name](value, keyed_generator(seed, full_name))
            parameter.copy_(value)


def keyed_generator(seed: int, name: str) -> Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
