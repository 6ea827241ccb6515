"""Forward passes whose routing is kept, whatever the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.errors import RequestError
from rmoe.moe.layers import RoutedLayer, names_of_calls, require_layers
from rmoe.moe.records import RoutingBatch, RoutingRecord


@dataclass
class Listening:
    """A `listen` in progress. `paused`: hear nothing for the moment."""

    paused: bool = False


@contextmanager
def listen(
    layers: Sequence[RoutedLayer], receive: Callable[[RoutedLayer, RoutingRecord], None]
) -> Iterator[Listening]:
    """Within, each call of a layer's experts hands its record to `receive`, before the experts run.

    A layer that runs more than once in a forward pass is heard each time, and so are calls of several threads:
    `receive` is called in the thread of the call. A call of another thread that had begun before is not heard.
    """
    opened_by = get_ident()
    outputs: dict[tuple[int, int], Any] = {}  # threads may call one layer at a time
    listening = Listening()

    def keep(layer: RoutedLayer, module: nn.Module, args: Any, output: Any) -> None:
        if not listening.paused:
            outputs[get_ident(), id(layer)] = output

    def read(layer: RoutedLayer, module: nn.Module, args: Any, kwargs: Any) -> None:
        if listening.paused:
            return
        thread = get_ident()
        key = thread, id(layer)
        if key not in outputs:
            if thread != opened_by:
                return
            raise RequestError("MODEL", layer.name, "a layer that calls its router before its experts")
        receive(layer, layer.reader.read(outputs.pop(key), args, kwargs))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.gate.register_forward_hook(partial(keep, layer)))
            before = layer.experts.register_forward_pre_hook(partial(read, layer), with_kwargs=True)
            hooks.enter_context(before)
        yield listening


def require_each_token(layer: RoutedLayer, record: RoutingRecord, tokens: int) -> None:
    """Check that a layer has routed each of the tokens once.

    Raises:
        RequestError: it has routed more or fewer.
    """
    if len(record.experts) != tokens:
        found = f"{len(record.experts)} decisions for {tokens} tokens"
        raise RequestError("MODEL", layer.name, f"a layer that routes each token once, not {found}")


class Recorder:
    """Calls a model and keeps what its routers decided.

    An encoder-decoder reads the same tokens on both sides.

    Args:
        model: an `RMoEForCausalLM`, or any transformers MoE.

    Attributes:
        layers: its MoE layers.
        called: the layer of each record: `layers`, in a looped model some of them more than once.
        num_experts, experts_per_token: the largest E and k of them.
        two_sided: an encoder-decoder.

    Raises:
        RequestError: it has no MoE layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = require_layers(model)
        self.num_experts = max(layer.num_experts for layer in self.layers)
        self.experts_per_token = max(layer.top_k for layer in self.layers)
        self.called = self.layers
        accepted = inspect.signature(model.forward).parameters
        # The head's logits, the largest tensor of a forward pass, are not needed beyond one position.
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.two_sided = bool(getattr(model.config, "is_encoder_decoder", False))

    @property
    def names(self) -> list[str]:
        """Of each record, see `names_of_calls`."""
        return names_of_calls(layer.name for layer in self.called)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[RoutingRecord]:
        """Run one forward pass.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding, which the records then leave out.

        Returns:
            One record per call of an MoE layer, in the order of the calls (lowest layer first), over the T = B * S
            tokens (less padding) in row order.

        Raises:
            RequestError: a layer cannot be read, or routes other tokens than those given.
        """
        records: list[RoutingRecord] = []
        called: list[RoutedLayer] = []

        def receive(layer: RoutedLayer, record: RoutingRecord) -> None:
            require_each_token(layer, record, input_ids.numel())
            called.append(layer)
            records.append(record)

        with listen(self.layers, receive):
            self.run(input_ids, attention_mask)
        self.called = called
        if attention_mask is None:
            return records
        keep = attention_mask.reshape(-1).bool()
        return [record.select(keep) for record in records]

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """The forward pass alone, for whoever listens by other means."""
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.two_sided:
            arguments |= {f"decoder_{name}": value for name, value in arguments.items()}
        self.model(**arguments, use_cache=False, **self._options)

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RoutingBatch:
        """The records of one forward pass, stacked."""
        return RoutingBatch.stack(self(input_ids, attention_mask))
