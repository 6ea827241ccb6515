"""Where a model routes, found by looking at it: a gate beside experts, in a stack of layers.

No family is named here. A module routes if it has a child `experts` and, beside it, a child called as gates are
called. Its layer is the element of the outermost `ModuleList` above it; the module that owns that list is the
backbone, whose forward passes each layer's result to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from rmoe.errors import RequestError

GATE_NAMES = ("gate", "router", "wg")


@dataclass(frozen=True)
class RoutedStack:
    """The routed layers of one model, by module path.

    Attributes:
        backbone: path of the module that owns the layers ("" is the model itself).
        layers: path of the `ModuleList`, from the model.
        gates: layer index -> path of its gate, from the layer; in layer order.
        hidden_size: `d`, width of what the gates read.
        initializer_range: standard deviation of the model's own initialisation.
    """

    backbone: str
    layers: str
    gates: dict[int, str]
    hidden_size: int
    initializer_range: float

    def gate_paths(self) -> list[str]:
        """Full paths of the gates, in layer order."""
        return [f"{self.layers}.{index}.{path}" for index, path in self.gates.items()]


def find_routed_stack(model: PreTrainedModel) -> RoutedStack:
    """The one stack of layers of `model` that routes.

    Raises:
        RequestError: no experts (a dense model), experts without a gate beside them, or more than one stack.
    """
    kind = model.config.model_type
    blocks = {path: block for path, block in model.named_modules() if _child(block, "experts") is not None}
    if not blocks:
        raise RequestError("model", kind, "a Mixture-of-Experts model; this one has no experts")
    stacks: dict[str, dict[int, str]] = {}
    for path, block in blocks.items():
        gate = next((name for name in GATE_NAMES if _child(block, name) is not None), None)
        if gate is None:
            raise RequestError("model", kind, f"a gate beside the experts of {path}: {', '.join(GATE_NAMES)}")
        layers, index, within = _outermost_list(model, f"{path}.{gate}" if path else gate, kind)
        if index in stacks.setdefault(layers, {}):
            raise RequestError("model", kind, f"one gate per layer; {layers}.{index} has two")
        stacks[layers][index] = within
    if len(stacks) > 1:
        raise RequestError("model", kind, f"one stack of routed layers; this one has {sorted(stacks)}")
    ((layers, gates),) = stacks.items()
    config = model.config.get_text_config()
    return RoutedStack(
        backbone=layers.rpartition(".")[0],
        layers=layers,
        gates=dict(sorted(gates.items())),
        hidden_size=config.hidden_size,
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
    )


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)


def _outermost_list(model: nn.Module, path: str, kind: str) -> tuple[str, int, str]:
    """Split a gate's path at the outermost `ModuleList`: its path, the element's index, the rest."""
    parts = path.split(".")
    for depth in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[:depth]), int(parts[depth]), ".".join(parts[depth + 1 :])
    raise RequestError("model", kind, f"layers in a ModuleList; {path} is in none")
