"""Is a model read correctly? Silence one expert at a time: exactly the tokens said to use it must change.

The block that holds gate and experts is run again inside the forward pass, in its own place, once as it is and once
with one expert's weights set to zero. So the check knows nothing of how the choice was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.layers import RoutedLayer
from rmoe.moe.recorder import Recorder, listen
from rmoe.moe.records import RoutingRecord
from rmoe.moe.tokens import first_tensor
from rmoe.results.analysis import ExpertCheck, ReadingCheck

EXPERTS_PER_LAYER = 3
"""The busiest, one of middling load, and the idlest: the last is where tokens would change that should not."""

LOUDER = 64.0
"""Where silence changes nothing, the expert's weights are multiplied by this: a part that was rounded away shows."""


@torch.no_grad()
def check_reading(model: nn.Module, input_ids: Tensor, per_layer: int = EXPERTS_PER_LAYER) -> ReadingCheck:
    """Check the reading of a model in evaluation mode, by one forward pass and `per_layer + 1` runs of each MoE block.

    Args:
        model: any that `Recorder` reads.
        input_ids: [B, S], a short text.
        per_layer: experts silenced in each layer.
    """
    recorder = Recorder(model)
    found: list[ExpertCheck] = []
    unchecked: set[str] = set()
    last: dict[str, RoutingRecord] = {}
    with ExitStack() as stack:
        hearing = stack.enter_context(
            listen(recorder.layers, lambda layer, record: last.update({layer.name: record}))
        )

        def look(layer: RoutedLayer, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if hearing.paused or layer.name not in last:
                return
            record = last.pop(layer.name)
            if not can_silence(layer):
                unchecked.add(layer.name)
                return
            hearing.paused = True
            try:
                found.extend(_silence_some(layer, block, args, kwargs, record, per_layer))
            finally:
                hearing.paused = False

        for layer in recorder.layers:
            block = model.get_submodule(layer.name)
            stack.enter_context(block.register_forward_hook(partial(look, layer), with_kwargs=True))
        recorder.run(input_ids)
    return ReadingCheck(
        passed=not last and all(one.passed for one in found),
        summary=_summary(input_ids.numel(), found, len(unchecked), [*last]),
        tokens=input_ids.numel(),
        experts=found,
    )


def _summary(tokens: int, experts: list[ExpertCheck], unchecked: int, uncalled: list[str]) -> str:
    """The verdict in a sentence.

    Args:
        unchecked: how many layers have experts whose weights cannot be set to zero.
        uncalled: layers that routed without a call of the module that holds gate and experts.
    """
    if uncalled:
        return f"failed: {uncalled[0]} routes, but is not called, so it cannot be run again ({len(uncalled)} layers)"
    if not experts:
        return "not checked: the experts' weights cannot be set to zero"
    layers, wrong = len({one.layer for one in experts}), [one for one in experts if not one.passed]
    what = f"{len(experts)} experts of {layers} layers, silenced one at a time on {tokens} tokens"
    if wrong:
        first = wrong[0]
        found = (
            f"expert {first.expert} of {first.layer}: {first.extra} other tokens changed, and {first.missed} "
        )
        return f"failed: {what}; {found}of its {first.said} did not ({len(wrong)} experts failed)"
    missed = sum(one.missed for one in experts)
    but = f", but for {missed} assignments whose part was rounded away" if missed else ""
    rest = f"; {unchecked} layers not checked: quantised" if unchecked else ""
    return f"passed: {what}, changed exactly the tokens said to use them{but}{rest}"


def _silence_some(
    layer: RoutedLayer, block: nn.Module, args: Any, kwargs: Any, record: RoutingRecord, per_layer: int
) -> Iterator[ExpertCheck]:
    whole = _output(block, args, kwargs)
    scale = whole.abs().amax(-1)
    noise = 4 * torch.finfo(whole.dtype).eps * scale
    for expert in _sample(record, with_weights(layer), per_layer):
        uses = ((record.experts == expert) & (record.weights != 0)).any(-1)
        with scaled(layer, expert, 0.0):
            difference = (_output(block, args, kwargs) - whole).abs().amax(-1)
        changed = difference != 0
        if not changed[uses].all():
            with scaled(layer, expert, LOUDER):
                changed |= (_output(block, args, kwargs) != whole).any(-1)
        sizes = (difference / scale)[uses & (scale > 0)]  # an output of 0 has no part that is an expert's
        yield ExpertCheck(
            layer=layer.name,
            expert=expert,
            said=int(uses.sum()),
            missed=int((~changed[uses]).sum()),
            extra=int((difference > noise)[~uses].sum()),
            change=float(sizes.mean()) if len(sizes) else 0.0,
        )


def _sample(record: RoutingRecord, num_experts: int, count: int) -> list[int]:
    """Experts spread over the load from the busiest to the idlest."""
    load = torch.bincount(record.experts.reshape(-1), minlength=record.num_experts + 1)[:num_experts]
    order = load.argsort(descending=True, stable=True).tolist()
    if count >= num_experts:
        return order
    return [order[round(i * (num_experts - 1) / max(count - 1, 1))] for i in range(count)]


def _output(block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The block's output for the T tokens, [T, d]."""
    output = first_tensor(block(*args, **kwargs))
    assert output is not None
    return output.reshape(-1, output.shape[-1])


def with_weights(layer: RoutedLayer) -> int:
    """How many experts have weights; further ones return their input as it is, or nothing (LongCat)."""
    stacked = [p.shape[0] for p in layer.experts.parameters(recurse=False) if p.dim() == 3]
    return min(stacked, default=layer.num_experts)


def can_silence(layer: RoutedLayer) -> bool:
    """Whether the experts' weights are plain floating-point tensors."""
    parameters = list(layer.experts.parameters())
    return bool(parameters) and all(p.is_floating_point() and p.element_size() > 1 for p in parameters)


@contextmanager
def scaled(layer: RoutedLayer, expert: int, factor: float) -> Iterator[None]:
    """Within, all weights of one expert are multiplied by a factor."""
    parts = list(_weights_of(layer, expert))
    saved = [part.clone() for part in parts]
    try:
        for part in parts:
            part.mul_(factor)
        yield
    finally:
        for part, values in zip(parts, saved, strict=True):
            part.copy_(values)


def _weights_of(layer: RoutedLayer, expert: int) -> Iterator[Tensor]:
    """Views of one expert's parameters: a submodule's, or its rows of each stacked tensor."""
    experts, count = layer.experts, layer.num_experts
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        bodies = [list(child.parameters()) for child in experts.children()]
        yield from (parameter.detach() for parameter in [body for body in bodies if body][expert])
        return
    for parameter in experts.parameters():
        if parameter.dim() == 3 and expert < parameter.shape[0]:
            yield parameter.detach()[expert]
        elif parameter.dim() == 2 and parameter.shape[0] % count == 0:  # a bias; or all experts' rows (DBRX)
            yield parameter.detach().unflatten(0, (count, -1))[expert]
