"""Where a graft goes: the one stack of routed layers of a model, and the module whose forward runs through it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from rmoe.errors import RequestError
from rmoe.moe.layers import RoutedLayer, routed_layers, routed_stacks


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
    stacks = routed_stacks(routed_layers(model))
    if not stacks:
        raise RequestError("model", kind, "a Mixture-of-Experts model; this one has no experts")
    if len(stacks) > 1:
        raise RequestError("model", kind, f"one stack of routed layers; this one has {sorted(stacks)}")
    ((path, layers),) = stacks.items()
    config = model.config.get_text_config()
    return RoutedStack(
        backbone=path.rpartition(".")[0],
        layers=path,
        gates=_gates(kind, path, layers),
        hidden_size=config.hidden_size,
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
    )


def _gates(kind: str, path: str, layers: list[RoutedLayer]) -> dict[int, str]:
    """Layer index -> path of its gate from the layer, in layer order."""
    gates: dict[int, str] = {}
    for layer in layers:
        if not path:
            raise RequestError("model", kind, f"layers in a ModuleList; {layer.gate_name} is in none")
        if layer.index in gates:
            raise RequestError("model", kind, f"one gate per layer; {path}.{layer.index} has two")
        gates[layer.index] = layer.gate_name.removeprefix(f"{path}.{layer.index}.")
    return dict(sorted(gates.items()))
