"""Forward passes whose routing is kept: an RMoE model returns it, a transformers MoE gives it to hooks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.analysis.families import MoELayer, find_transformers_layers
from rmoe.analysis.record import RoutingBatch, RoutingRecord
from rmoe.errors import RequestError
from rmoe.graft.modules import GraftedGate
from rmoe.model.modeling_rmoe import RMoEPreTrainedModel

_EXPERT_ARGUMENTS = ((0, "hidden_states"), (1, "top_k_index"), (2, "top_k_weights"))


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, lowest first.

    Raises:
        RequestError: there are none, or they are not all of one size.
    """
    layers = _rmoe_layers(model) or find_transformers_layers(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not layers:
        raise RequestError("MODEL", kind, "a model with MoE layers: a router beside experts")
    sizes = {(layer.num_experts, layer.experts_per_token) for layer in layers}
    if len(sizes) > 1:
        raise RequestError(
            "MODEL", kind, f"the same experts and experts per token in every MoE layer, not {sizes}"
        )
    return layers


def _rmoe_layers(model: nn.Module) -> list[MoELayer]:
    if not isinstance(model, RMoEPreTrainedModel):
        return []
    sizes = model.config.num_experts, model.config.num_experts_per_tok
    blocks = {
        id(block.gate): (name, block) for name, block in model.named_modules() if hasattr(block, "gate")
    }
    found = [(router, *blocks[id(router)]) for router in model.routers]
    return [MoELayer(name, router, block.experts, *sizes, family=None) for router, name, block in found]


def find_shared(model: nn.Module, layers: Sequence[MoELayer]) -> nn.Module | None:
    """The module with what the routers of all layers share (the recurrent cell); None if they share nothing."""
    if isinstance(model, RMoEPreTrainedModel):
        return model.trunk.router_shared
    gate = layers[0].router
    return gate.shared() if isinstance(gate, GraftedGate) else None


class Recorder:
    """Calls a model and keeps what its routers decided.

    Args:
        model: an `RMoEForCausalLM`, or any transformers MoE.

    Raises:
        RequestError: see `find_moe_layers`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = find_moe_layers(model)
        self.num_experts = self.layers[0].num_experts
        self.experts_per_token = self.layers[0].experts_per_token
        self.shared = find_shared(model, self.layers)
        accepted = inspect.signature(model.forward).parameters
        # The head's logits, the largest tensor of a forward pass, are not needed beyond one position.
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[RoutingRecord]:
        """Run one forward pass.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding, which the records then leave out.

        Returns:
            One record per MoE layer, lowest first, over the T = B * S tokens (less padding) in row order.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "use_cache": False,
            **self._options,
        }
        if self.layers[0].family is None:
            routings = self.model(**arguments, output_routing=True).routing
            records = [RoutingRecord.from_routing(routing, self.num_experts) for routing in routings]
        else:
            records = self._call_hooked(arguments)
        if attention_mask is None:
            return records
        keep = attention_mask.reshape(-1).bool()
        return [record.select(keep) for record in records]

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RoutingBatch:
        """The records of one forward pass, stacked."""
        return RoutingBatch.stack(self(input_ids, attention_mask))

    def _call_hooked(self, arguments: dict[str, Any]) -> list[RoutingRecord]:
        from_router: dict[int, Sequence[Any]] = {}
        to_experts: dict[int, Sequence[Any]] = {}
        handles = []
        for index, layer in enumerate(self.layers):

            def keep_output(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                from_router[index] = output

            def keep_input(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                to_experts[index] = [
                    args[position] if position < len(args) else kwargs.get(name)
                    for position, name in _EXPERT_ARGUMENTS
                ]

            handles.append(layer.router.register_forward_hook(keep_output))
            handles.append(layer.experts.register_forward_pre_hook(keep_input, with_kwargs=True))
        try:
            self.model(**arguments)
        finally:
            for handle in handles:
                handle.remove()
        return [
            layer.family.record(from_router[index], to_experts[index], layer)  # type: ignore[union-attr]
            for index, layer in enumerate(self.layers)
        ]
