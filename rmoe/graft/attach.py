"""Put a recurrent router onto a model in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmoe.compat import is_replica
from rmoe.errors import RequestError
from rmoe.graft.discover import RoutedStack, find_routed_stack
from rmoe.graft.modules import (
    CellOwner,
    GraftedGate,
    GraftedLayer,
    RecurrentOffset,
    grafted_gate_class,
    grafted_layer_class,
)
from rmoe.graft.spec import GraftSpec
from rmoe.routing.initial import Initialized, draw
from rmoe.routing.options import Geometry
from rmoe.routing.recurrence import SharedRecurrence

CELL = "router_cell"
OFFSET = "router_offset"


def attach(model: PreTrainedModel, spec: GraftSpec) -> RoutedStack:
    """Add the cell, projectors and `B`s of `spec` and change the classes of layers and gates.

    Parameters take the model's dtype and each gate's device. On a model without weights (the meta device) they are
    made where torch makes tensors at that moment: with values, or on the meta device too, to be loaded.
    """
    if hasattr(model, "update_routers"):
        raise RequestError(
            "model", model.config.model_type, "an MoE of another family; this one's router has memory"
        )
    stack = find_routed_stack(model)
    backbone = model.get_submodule(stack.backbone)
    layers = model.get_submodule(stack.layers)
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    geometry = Geometry(
        hidden_size=stack.hidden_size,
        num_experts=1,  # the family's gate knows; a recurrence has no use for it
        top_k=1,
        num_layers=len(stack.gates),
        initializer_range=stack.initializer_range,
    )
    cell = SharedRecurrence(spec.recurrence, geometry) if spec.recurrence.has_shared else None
    setattr(backbone, CELL, cell if cell is None else _placed(cell, like))
    for index in range(min(stack.gates), max(stack.gates) + 1):
        _attach_layer(layers[index], index, stack, spec, geometry, backbone, like)
    backbone.register_forward_pre_hook(_rebind_replica)
    initialize_graft(model, spec.seed)
    return stack


def is_grafted(model: nn.Module) -> bool:
    """Whether a model, or a model within it, has a graft."""
    return any(isinstance(module, GraftedGate) for module in model.modules())


def _attach_layer(
    layer: Any,
    index: int,
    stack: RoutedStack,
    spec: GraftSpec,
    geometry: Geometry,
    backbone: nn.Module,
    like: Tensor,
) -> None:
    layer.__class__ = grafted_layer_class(type(layer))  # type: ignore[arg-type]
    layer.gate_path = stack.gates.get(index)
    layer.index, layer.last, layer.owner = index, max(stack.gates), CellOwner(backbone)
    if layer.gate_path is None:
        return
    gate: Any = layer.get_submodule(layer.gate_path)
    like = torch.empty(0, dtype=like.dtype, device=next(gate.parameters()).device)
    gate.__class__ = grafted_gate_class(type(gate))  # type: ignore[arg-type]
    of_layer = replace(geometry, layer_index=list(stack.gates).index(index))
    gate.add_module(OFFSET, _placed(RecurrentOffset(spec, of_layer), like))
    gate.pure = spec.pure
    gate.owner = CellOwner(backbone)


def _placed(module: nn.Module, like: Tensor) -> nn.Module:
    return module.to(dtype=like.dtype, device=None if like.is_meta else like.device)


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
