"""Which layers below, and how much the recurrent state, speak for the experts that are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.graft.modules import GraftedGate
from rmoe.moe import RoutedLayer, RoutingRecord, listen, scorer_matrix
from rmoe.moe.reading import is_own
from rmoe.moe.tokens import first_tensor
from rmoe.results.analysis import Contributions

LINEAR = 0.02
"""Of the logits' spread: how far they may be from linear in the router's input. bfloat16 rounds them to 0.4%."""


@dataclass
class _Heard:
    """What one routed layer's call had, each [T, d].

    Attributes:
        read: the router's input. stream: the residual stream that its norm read.
        offset: what a graft adds to the input.
        without: [T, C] logits with the state of the layer below taken away.
        record: the decision.
    """

    read: Tensor | None = None
    stream: Tensor | None = None
    offset: Tensor | None = None
    without: Tensor | None = None
    record: RoutingRecord | None = None


@dataclass
class _Element:
    """One element of the stack in one pass: its input, what its parts returned, whether its output is a part's own."""

    entered: Tensor | None = None
    normed: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    left_by_norm: bool = False


class RouteContributions:
    """Streams what each source adds to the advantage of the chosen experts.

        advantage_t = mean over t's chosen experts of their logits - mean over all experts
        x_t = D_t r_t             D_t: the norm's weight over its scale, held fixed
        r_t = sum_j part_jt       the embedding, and what each layer below added
        contribution_j = mean over tokens of a_t . (D_t part_jt)
                                  a_t: mean of the chosen rows of G - mean of all rows

    Exact for a router whose logits are linear in its input, in a model whose stream is a sum (pre-norm): contributions
    then sum to the advantage, but for a bias of the router. Whether both hold is found out on the values of each pass:
    the input must be a norm's output in fixed proportion to the stream, the logits `G x` up to a constant, and no
    layer's output a norm's. Elsewhere the row is absent.

    The state's part is exact for a graft, whose gate reads `x + B h`; for RMoE's own recurrent routers it is the
    advantage lost when the router is called once more with an empty state.

    Args:
        model: in evaluation mode.
        layers: its routed layers, of one stack.
        shared: what the routers share.
    """

    def __init__(self, model: nn.Module, layers: Sequence[RoutedLayer], shared: nn.Module | None) -> None:
        self.layers, self._shared = layers, shared
        stacks = {layer.stack for layer in layers}
        self._elements: list[nn.Module] = []
        if len(stacks) == 1 and "" not in stacks:
            self._elements = list(model.get_submodule(stacks.pop()).children())
        count = len(self._elements)
        self._sums = torch.zeros(len(layers), count + 1, dtype=torch.float64)
        self._state = torch.zeros(len(layers), dtype=torch.float64)
        self._total = torch.zeros(len(layers), dtype=torch.float64)
        self._linear = [count > 0] * len(layers)
        self._has_state = [True] * len(layers)
        self.n = 0
        self._heard: list[_Heard] = []
        self._passed: list[_Element] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a forward pass is heard."""
        self._heard = [_Heard() for _ in self.layers]
        self._passed = [_Element() for _ in self._elements]
        places = {id(layer): at for at, layer in enumerate(self.layers)}
        with ExitStack() as stack:

            def receive(layer: RoutedLayer, record: RoutingRecord) -> None:
                at = places[id(layer)]
                if self._heard[at].record is not None:  # a looped model: a layer has no one input
                    self._linear[at] = self._has_state[at] = False
                self._heard[at].record = record

            for at, element in enumerate(self._elements):
                self._listen_to_element(stack, self._passed[at], element)
            for at, layer in enumerate(self.layers):
                self._listen_to_gate(stack, self._heard[at], layer)
            stack.enter_context(listen(self.layers, receive))
            yield

    @staticmethod
    def _listen_to_element(stack: ExitStack, passed: _Element, element: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            passed.entered = _tokens(first_tensor(args, kwargs))
            passed.normed = []

        def part(module: nn.Module, args: Any, output: Any) -> None:
            read = first_tensor(args)
            if isinstance(output, Tensor) and read is not None and output.shape == read.shape:
                passed.normed.append((output.data_ptr(), _tokens(read), output))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            left = first_tensor(output)
            passed.left_by_norm = any(left is out for _, _, out in passed.normed)
            passed.normed = []

        stack.enter_context(element.register_forward_pre_hook(enter, with_kwargs=True))
        stack.enter_context(element.register_forward_hook(leave))
        for child in element.children():
            stack.enter_context(child.register_forward_hook(part))

    def _listen_to_gate(self, stack: ExitStack, heard: _Heard, layer: RoutedLayer) -> None:
        gate = layer.gate
        passed = self._passed[layer.index] if self._elements else _Element()

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            read = first_tensor(args, kwargs)
            if read is None:
                return
            heard.read = _tokens(read)
            found = [before for place, before, _ in passed.normed if place == read.data_ptr()]
            heard.stream = found[0] if found else None

        def offset(module: nn.Module, args: Any, output: Any) -> None:
            heard.offset = output[0].detach()

        def again(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if len(args) > 1 and args[1]:  # `forward` and not a call: this hook is not for that run
                heard.without = gate.forward(args[0], (), *args[2:], **kwargs)[0].logits.detach()

        stack.enter_context(gate.register_forward_pre_hook(keep, with_kwargs=True))
        if isinstance(gate, GraftedGate):
            stack.enter_context(gate.router_offset.register_forward_hook(offset))
        elif is_own(gate):
            stack.enter_context(gate.register_forward_hook(again, with_kwargs=True))

    def update(self) -> None:
        """Add what was heard."""
        heard, self._heard = self._heard, []
        passed, self._passed = self._passed, []
        for at, (layer, one) in enumerate(zip(self.layers, heard, strict=True)):
            if one.record is None or one.read is None:
                self._linear[at] = self._has_state[at] = False
                continue
            self._add(at, layer, one, passed)
        if heard and heard[0].record is not None:
            self.n += len(heard[0].record.experts)

    def _add(self, at: int, layer: RoutedLayer, one: _Heard, passed: list[_Element]) -> None:
        assert one.record is not None
        assert one.read is not None
        logits = one.record.logits.float()[:, : layer.num_experts]
        share = _share_of_chosen(one.record).to(logits.device)
        total = (share * logits).sum(-1)
        self._total[at] += float(total.double().sum())
        matrix = scorer_matrix(layer, self._shared)
        rows = None
        if matrix is not None and matrix.shape[1] == one.read.shape[1]:
            rows = matrix[: layer.num_experts].float()
        self._add_state(at, layer, one, share, total, rows)
        pure = isinstance(layer.gate, GraftedGate) and layer.gate.pure
        x = one.read.float() + (0 if one.offset is None else one.offset.float())
        below = passed[: layer.index + 1]
        inputs = [element.entered for element in below]
        scale = None if one.stream is None else _fixed_scale(one.read.float(), one.stream.float())
        if (
            not self._linear[at]
            or rows is None
            or scale is None
            or pure
            or not _is_linear(logits, x @ rows.T)
            or any(element.left_by_norm for element in passed)
            or any(entered is None for entered in inputs)
        ):
            self._linear[at] = False
            return
        direction = (share @ rows) * scale
        streams = [entered.float() for entered in inputs if entered is not None]
        assert one.stream is not None
        ends = [*streams, one.stream.float()]
        parts = [streams[0], *(after - before for before, after in pairwise(ends))]
        for place, part in enumerate(parts):  # the embedding, the layers below, and this layer's attention
            self._sums[at, place] += float((direction * part).sum(-1).double().sum())

    def _add_state(
        self, at: int, layer: RoutedLayer, one: _Heard, share: Tensor, total: Tensor, rows: Tensor | None
    ) -> None:
        if one.offset is not None and rows is not None:
            part = (share * (one.offset.float() @ rows.T)).sum(-1)
        elif one.without is not None:
            part = total - (share * one.without.float()[:, : layer.num_experts]).sum(-1)
        else:
            self._has_state[at] = False
            return
        self._state[at] += float(part.double().sum())

    @property
    def known(self) -> bool:
        """Whether there is anything to show: a row that is exact, or a state."""
        return self.n > 0 and (any(self._linear) or any(self._has_state))

    def result(self) -> Contributions:
        """In logits; the sources are the embedding and the elements of the stack.

        A layer's own column is its attention's, which lies below its router; None above it, in a row that is not
        exact, and where there is no state.
        """
        n = max(self.n, 1)
        rows: list[list[float | None]] = []
        for at, layer in enumerate(self.layers):
            values = (self._sums[at] / n).tolist()
            known = self._linear[at]
            rows.append([v if known and place <= layer.index + 1 else None for place, v in enumerate(values)])
        state = [float(v) / n if has else None for v, has in zip(self._state, self._has_state, strict=True)]
        return Contributions(
            sources=["embedding", *(f"layer {at}" for at in range(len(self._elements)))],
            values=rows,
            state=state,
            advantage=(self._total / n).tolist(),
            n=self.n,
        )


def _share_of_chosen(record: RoutingRecord) -> Tensor:
    """[T, E]: each chosen expert's part of the mean over the chosen, less 1 / E; zero for a token without experts."""
    experts = record.num_experts
    used = record.experts < experts
    count = used.sum(-1, keepdim=True)
    share = torch.zeros(len(used), experts + 1, device=used.device)
    share.scatter_add_(1, record.experts.clamp(max=experts), used / count.clamp(min=1))
    return (share[:, :experts] - 1 / experts) * (count > 0)


def _fixed_scale(read: Tensor, stream: Tensor) -> Tensor | None:
    """`D_t`, [T, d], with `read = D_t stream`, where it is a scale per token times one per channel; else None."""
    scale = torch.where(stream == 0, 0.0, read / stream)
    large = stream.abs() > 0.01 * stream.abs().amax(
        -1, keepdim=True
    )  # of smaller ones rounding is all that is left
    weight = (scale * large).sum(0) / large.sum(0).clamp(min=1)
    size = weight.square().sum()
    by_token = (scale * large * weight).sum(-1) / (large * weight.square()).sum(-1).clamp(min=1e-30)
    wrong = ((scale - by_token[:, None] * weight) * large).square().mean()
    if size == 0 or wrong > LINEAR**2 * (scale * large).square().mean():
        return None
    return scale


def _is_linear(logits: Tensor, product: Tensor) -> bool:
    """Whether logits are the product up to a constant of each expert."""
    rest = logits - product
    return bool(
        (rest - rest.mean(0)).square().mean() <= LINEAR**2 * (logits - logits.mean(0)).square().mean()
    )


def _tokens(value: Tensor | None) -> Any:
    return None if value is None else value.detach().reshape(-1, value.shape[-1])
