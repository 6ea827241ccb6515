"""Put a recurrent router onto a model in memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rmoe.compat import is_replica
from rmoe.errors import RequestError
from rmoe.graft.modules import (
    CellOwner,
    GraftedGate,
    GraftedLayer,
    RecurrentOffset,
    grafted_gate_class,
    grafted_layer_class,
)
from rmoe.graft.spec import GraftSpec
from rmoe.moe.layers import RoutedLayer, routed_layers, routed_stacks
from rmoe.routing.initial import Initialized, draw
from rmoe.routing.options import Geometry
from rmoe.routing.recurrence import SharedRecurrence

CELL = "router_cell"
OFFSET = "router_offset"


def routed_stack(model: PreTrainedModel) -> list[RoutedLayer]:
    """The one stack of layers of `model` that routes, in layer order.

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
    layers = sorted(layers, key=attrgetter("index"))
    if not path:
        raise RequestError("model", kind, f"layers in a ModuleList; {layers[0].gate_name} is in none")
    for layer, following in pairwise(layers):
        if layer.index == following.index:
            raise RequestError("model", kind, f"one gate per layer; {path}.{layer.index} has two")
    return layers


def attach(model: PreTrainedModel, spec: GraftSpec) -> list[RoutedLayer]:
    """Add the cell, projectors and `B`s of `spec` and change the classes of layers and gates.

    Parameters take the model's dtype and each gate's device. On a model without weights (the meta device) they are
    made where torch makes tensors at that moment: with values, or on the meta device too, to be loaded.

    Returns:
        The layers whose gates were grafted, in layer order.
    """
    if hasattr(model, "update_routers"):
        raise RequestError(
            "model", model.config.model_type, "an MoE of another family; this one's router has memory"
        )
    stack = routed_stack(model)
    path, config = stack[0].stack, model.config.get_text_config()
    backbone = model.get_submodule(path.rpartition(".")[0])
    layers: Any = model.get_submodule(path)
    geometry = Geometry(
        hidden_size=config.hidden_size,
        num_experts=1,  # the family's gate knows; a recurrence has no use for it
        top_k=1,
        num_layers=len(stack),
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
    )
    cell = SharedRecurrence(spec.recurrence, geometry) if spec.recurrence.has_shared else None
    setattr(backbone, CELL, cell if cell is None else _placed(cell, model.dtype, model.device))
    for index in range(stack[0].index, stack[-1].index + 1):
        layer = layers[index]
        layer.__class__ = grafted_layer_class(type(layer))  # type: ignore[arg-type]
        layer.gate_path = None
        layer.index, layer.last, layer.owner = index, stack[-1].index, CellOwner(backbone)
    for number, routed in enumerate(stack):
        layers[routed.index].gate_path = routed.gate_name.removeprefix(f"{path}.{routed.index}.")
        gate: Any = routed.gate
        device = next(gate.parameters()).device
        gate.__class__ = grafted_gate_class(type(gate))  # type: ignore[arg-type]
        offset = RecurrentOffset(spec, replace(geometry, layer_index=number))
        gate.add_module(OFFSET, _placed(offset, model.dtype, device))
        gate.pure, gate.owner = spec.pure, CellOwner(backbone)
    backbone.register_forward_pre_hook(_rebind_replica)
    initialize_graft(model, spec.seed)
    return stack


def is_grafted(model: nn.Module) -> bool:
    """Whether a model, or a model within it, has a graft."""
    return any(isinstance(module, GraftedGate) for module in model.modules())


def _placed(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return module.to(dtype=dtype, device=None if device.type == "meta" else device)


def _rebind_replica(backbone: nn.Module, args: Any) -> None:
    """In a replica of `nn.DataParallel`, point the gates at the replica's own cell."""
    if is_replica(backbone):
        for module in backbone.modules():
            if isinstance(module, GraftedGate | GraftedLayer):
                module.owner = CellOwner(backbone)


def initialize_graft(model: nn.Module, seed: int) -> None:
    """Start values of the graft's parameters, each drawn in float32 from a generator keyed by (seed, its name)."""
    for path, module in model.named_modules():
        if isinstance(module, Initialized):
            draw(module, module.initializers(), seed, f"{path}.")
