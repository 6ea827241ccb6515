"""Forward passes whose routing is kept, whatever the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.errors import RequestError
from rmoe.moe.layers import RoutedLayer, kind_of, require_layers
from rmoe.moe.record import RoutingBatch, RoutingRecord


@contextmanager
def listen(
    layers: Sequence[RoutedLayer], receive: Callable[[RoutedLayer, RoutingRecord], None]
) -> Iterator[None]:
    """Within, each call of a layer's experts hands its record to `receive`, before the experts run.

    A layer that runs more than once in a forward pass is heard each time.
    """
    outputs: dict[int, Any] = {}
    handles = []
    for layer in layers:

        def keep(module: nn.Module, args: Any, output: Any, layer: RoutedLayer = layer) -> None:
            outputs[id(layer)] = output

        def read(module: nn.Module, args: Any, kwargs: Any, layer: RoutedLayer = layer) -> None:
            if id(layer) not in outputs:
                raise RequestError("MODEL", layer.name, "a layer that calls its router before its experts")
            receive(layer, layer.reader.read(outputs.pop(id(layer)), args, kwargs))

        handles.append(layer.gate.register_forward_hook(keep))
        handles.append(layer.experts.register_forward_pre_hook(read, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Calls a model and keeps what its routers decided.

    Args:
        model: an `RMoEForCausalLM`, or any transformers MoE.

    Raises:
        RequestError: it has no MoE layers, or they are not all of one size.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = require_layers(model)
        sizes = {(layer.num_experts, layer.top_k) for layer in self.layers}
        if len(sizes) > 1:
            allowed = f"the same experts and experts per token in every MoE layer, not {sizes}"
            raise RequestError("MODEL", kind_of(model), allowed)
        self.num_experts, self.experts_per_token = sizes.pop()
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
        records: dict[str, RoutingRecord] = {}
        with listen(self.layers, lambda layer, record: records.update({layer.name: record})):
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **self._options)
        found = [records[layer.name] for layer in self.layers]
        if attention_mask is None:
            return found
        keep = attention_mask.reshape(-1).bool()
        return [record.select(keep) for record in found]

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RoutingBatch:
        """The records of one forward pass, stacked."""
        return RoutingBatch.stack(self(input_ids, attention_mask))
