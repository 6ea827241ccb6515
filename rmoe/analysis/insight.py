"""What needs the hidden states of a live model: predictability of the next layer's choice, and REAP's saliency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.analysis.probe import ChoiceProbe, top_k_recall
from rmoe.graft.modules import GraftedGate
from rmoe.moe import RoutedLayer, RoutingBatch, scorer_matrix
from rmoe.moe.reading import DenseReader, is_own
from rmoe.results import analysis as schema


class Predictability:
    """Streams top-k recall of each layer's choice from what the layer below knows: its router's input, and its state.

    By the layer's own scorer matrix:

        predicted = top-k of G_{l+1} x_l;   recall = |predicted & chosen_{l+1}| / |chosen_{l+1}|

    `G` alone: a selection bias, or what a router does to its input first, is not applied. What that costs is seen on
    the router's own input `x_{l+1}`, which is measured too.

    By linear probes (`ChoiceProbe`): of `x_l`, and of the recurrent state that layer l's router of RMoE, or of a graft,
    passes on.

    Args:
        layers: in order.
        shared: what the routers share, see `scorer_matrix`.
        fit_tokens: see `ChoiceProbe`.

    Source: Megatron-LM, tools/moe_routing/analyze_routing_predictability.py, which compares loads; here it is each
    token's choice.
    """

    def __init__(self, layers: Sequence[RoutedLayer], shared: nn.Module | None, fit_tokens: int) -> None:
        self.layers, self._shared = layers, shared
        sizes = [(layer.num_experts, layer.top_k) for layer in layers[1:]]
        self._probe, self._state_probe = (ChoiceProbe(sizes, fit_tokens) for _ in range(2))
        self._sums = torch.zeros(2, len(layers) - 1, dtype=torch.float64)
        self._counts = torch.zeros(2, len(layers) - 1, dtype=torch.int64)
        self._inputs: list[Tensor] = []
        self._states: list[Tensor | None] = []
        self.n = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a forward pass is heard."""
        self._inputs, self._states = [], []

        def keep(module: nn.Module, args: Any) -> None:
            self._inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))

        def keep_state(module: nn.Module, args: Any, output: Any) -> None:
            state = output[1] if is_own(module) else ()
            if isinstance(module, GraftedGate):
                state = module.ride.outgoing or ()
            self._states.append(state[0].detach() if state else None)

        with ExitStack() as hooks:
            for layer in self.layers:
                hooks.enter_context(layer.gate.register_forward_pre_hook(keep))
                hooks.enter_context(layer.gate.register_forward_hook(keep_state))
            yield

    def update(self, batch: RoutingBatch) -> None:
        """Add what was heard."""
        (inputs, states), self._inputs, self._states = (self._inputs, self._states), [], []
        if len(inputs) != len(self.layers) or len(batch.experts) != len(self.layers):
            return  # a looped model: a layer has no one input
        for above, layer in enumerate(self.layers[1:]):
            matrix = scorer_matrix(layer, self._shared)
            chosen = batch.experts[above + 1].to(inputs[0].device)
            for which, x in enumerate((inputs[above], inputs[above + 1])):
                if matrix is None or matrix.shape[1] != x.shape[-1] or len(x) != len(chosen):
                    continue
                scores = x.to(matrix.dtype) @ matrix.T
                recall, count = top_k_recall(scores[:, : layer.num_experts], chosen, layer.top_k)
                self._sums[which, above] += recall
                self._counts[which, above] += count
        choices = [batch.experts[at].to(inputs[0].device) for at in range(1, len(inputs))]
        for probe, known in ((self._probe, inputs), (self._state_probe, states)):
            pairs = zip(known[:-1], choices, strict=True)
            probe.update([x if x is not None and len(x) == len(c) else None for x, c in pairs], choices)
        self.n += batch.num_tokens

    def result(self) -> schema.Predictability:
        """Recall from the input below, the router's own input, and the probes; None where it cannot be measured."""
        below, own = (
            [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
            for sums, counts in zip(self._sums, self._counts, strict=True)
        )
        return schema.Predictability(
            own_router=below,
            at_its_own_input=own,
            chance=[layer.top_k / layer.num_experts for layer in self.layers[1:]],
            probe=self._probe.result(),
            state_probe=self._state_probe.result(),
            n=self.n,
        )


class Saliency:
    """Streams REAP's saliency of each expert (arXiv:2510.13999, Eq. 9).

        S_j = mean over the tokens sent to j of g_j(x) |f_j(x)|_2

    `g_j` is the weight that the layer multiplies the expert's output by. Every expert runs once more on its tokens, one
    slot at a time. NaN for an expert without tokens, and for layers whose experts are not told their choice.
    """

    def __init__(self, layers: Sequence[RoutedLayer]) -> None:
        self.layers = layers
        most = max(layer.num_experts for layer in layers)
        self._sums = torch.zeros(len(layers), most, dtype=torch.float64)
        self._counts = torch.zeros(len(layers), most, dtype=torch.int64)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a forward pass is heard."""
        with ExitStack() as hooks:
            for index, layer in enumerate(self.layers):
                if not isinstance(layer.reader, DenseReader):
                    add = partial(self._add, index, layer)
                    hooks.enter_context(layer.experts.register_forward_pre_hook(add, with_kwargs=True))
            yield

    def _add(self, index: int, layer: RoutedLayer, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(given) != 3 or given[1].dim() != 2 or given[1].is_floating_point():
            return
        hidden, chosen, weights = given
        for slot in range(chosen.shape[1]):
            one, weight = chosen[:, slot : slot + 1], weights[:, slot : slot + 1]
            # `forward` and not a call: hooks, this one among them, are not for these runs.
            output = layer.experts.forward(hidden, one, torch.ones_like(weight))
            value = output.detach().reshape(len(one), -1).float().norm(dim=-1) * weight[:, 0].float()
            used = (one[:, 0] < layer.num_experts) & (weight[:, 0] != 0)
            ids = one[:, 0][used].cpu()
            self._sums[index].index_add_(0, ids, value[used].double().cpu())
            self._counts[index].index_add_(0, ids, torch.ones_like(ids))

    def result(self) -> Tensor:
        """[L, E] float32."""
        return (self._sums / self._counts).float()
