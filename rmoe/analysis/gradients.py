"""The gradient that reaches a router, split by where it comes from (Table 11), and the recurrent part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.graft.modules import GraftedGate
from rmoe.model.head import next_token_loss
from rmoe.model.modeling_rmoe import RMoEPreTrainedModel
from rmoe.moe import RoutedLayer
from rmoe.results.analysis import GradientSplit

_STATE_ARGUMENTS = ("state", "router_states")  # of our routers, of ZAYA1's
LOSS_SCALE = 2.0**14
"""Times the loss in float16: a mean's gradient per token is then an ordinary number, and well below 65,504."""


def find_shared(model: nn.Module, layers: Sequence[RoutedLayer]) -> nn.Module | None:
    """The module with what the routers of all layers share (the recurrent cell); None if they share nothing."""
    if isinstance(model, RMoEPreTrainedModel):
        return model.trunk.router_shared
    gate = layers[0].gate
    return gate.shared() if isinstance(gate, GraftedGate) else None


def trainable_aux_loss(output: Any) -> Tensor | None:
    """The balance loss of a forward pass without its weight; None if it has none that can be trained."""
    loss = getattr(output, "aux_loss", None)
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def balance_loss(model: nn.Module, output: Any) -> Tensor | None:
    """The balance loss of a forward pass with the weight it is added with; None if the model has none."""
    loss = trainable_aux_loss(output)
    if loss is None:
        return None
    if isinstance(model, RMoEPreTrainedModel):
        weighted: Tensor | None = output.balance_loss
        return weighted
    return loss * model.config.router_aux_loss_coef  # type: ignore[union-attr, operator]


def _asking_for_balance(model: nn.Module, input_ids: Tensor) -> dict[str, Any]:
    """The arguments with which a forward pass also computes its balance loss; none where it has none."""
    if isinstance(model, RMoEPreTrainedModel):
        return {"labels": input_ids}
    return {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}


@contextmanager
def recurrence_cut(layers: Sequence[RoutedLayer]) -> Iterator[list[bool]]:
    """Detach the state that each router receives from the layer below; the forward values stay the same.

    Yields a list that gets an entry for each tensor of state that carried a gradient: if it is still empty after
    a forward pass, the model has no recurrent gradient.
    """
    found: list[bool] = []

    def detach(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.requires_grad:
                found.append(True)
            return value.detach()
        return tuple(detach(part) for part in value) if isinstance(value, tuple) else value

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cut = {name: detach(value) if name in _STATE_ARGUMENTS else value for name, value in kwargs.items()}
        return (*args[:1], *map(detach, args[1:2]), *args[2:]), cut

    def before_grafted(module: Any, args: tuple, kwargs: dict) -> None:
        ride = module.ride  # a grafted gate carries its state for the length of a call
        ride.incoming = detach(ride.incoming)

    with ExitStack() as hooks:
        for layer in layers:
            hook = before_grafted if isinstance(layer.gate, GraftedGate) else before
            hooks.enter_context(layer.gate.register_forward_pre_hook(hook, with_kwargs=True))
        yield found


class MeanGradient:
    """The mean over batches of one loss's gradient.

    With parameters in float16, whose smallest numbers many gradients are below, of the loss times `LOSS_SCALE`; where
    that overflows, of the loss itself.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.scale = LOSS_SCALE if any(p.dtype == torch.float16 for p in parameters) else 1.0
        self.total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.count = 0

    def add(self, loss: Tensor, *, keep_graph: bool = False) -> None:
        scale, scaled = self.scale, loss.float() * self.scale if self.scale != 1 else loss
        gradients = self._of(scaled, keep_graph or self.scale != 1)
        if self.scale != 1 and not all(g is None or bool(g.isfinite().all()) for g in gradients):
            scale, gradients = 1.0, self._of(loss, keep_graph)
        for total, gradient in zip(self.total, gradients, strict=True):
            if gradient is not None:
                total += gradient if scale == 1 else gradient.float() / scale
        self.count += 1

    def _of(self, loss: Tensor, keep_graph: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, self.parameters, retain_graph=keep_graph, allow_unused=True)

    def mean(self) -> list[Tensor]:
        return [total / max(self.count, 1) for total in self.total]


def norms(gradients: Sequence[Tensor], owned: Sequence[Sequence[nn.Parameter]]) -> list[float]:
    """The norm over each owner's gradients.

    Args:
        gradients: of all owners' parameters, one owner after the other.
        owned: each owner's parameters.
    """
    rest = iter(gradients)
    return [_norm([next(rest) for _ in own]) for own in owned]


def _norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all entries of all tensors."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


@contextmanager
def _only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradient is computed for any other parameter meanwhile."""
    wanted = {id(p) for p in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in wanted]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def router_gradients(
    model: nn.Module,
    layers: Sequence[RoutedLayer],
    shared: nn.Module | None,
    batches: Sequence[Tensor],
    step: int = 0,
) -> GradientSplit | None:
    """Measure the split on a sample; None if that is empty, or the routers have nothing to train.

    Gradients are averaged over the sample before their norm is taken. `recurrent`, what comes down through the state,
    is None without recurrence, as is `language_model_cut`.

    The model is used in the mode it is in; call it in evaluation mode, where neither dropout nor routing noise
    acts, so that the passes with and without the cut differ in the cut alone. Its parameters and their `.grad`
    are left as they were.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        shared: the module with the routers' shared parameters; None if they share nothing.
        batches: [B, S] token ids each, all of one shape.
        step: optimizer steps that the model was trained for.
    """
    owners = [layer.gate for layer in layers] + ([shared] if shared is not None else [])
    owned = [[p for p in owner.parameters() if p.requires_grad] for owner in owners]
    parameters = [p for own in owned for p in own]
    whole, balance, cut = (MeanGradient(parameters) for _ in range(3))
    if not batches or not parameters:
        return None
    with _only_trainable(model, parameters):
        for input_ids in batches:
            output = model(input_ids=input_ids, use_cache=False, **_asking_for_balance(model, input_ids))
            auxiliary = balance_loss(model, output)
            whole.add(next_token_loss(output.logits, input_ids, "mean"), keep_graph=auxiliary is not None)
            if auxiliary is not None:
                balance.add(auxiliary)
            with recurrence_cut(layers) as found:
                output = model(input_ids=input_ids, use_cache=False)
            if found:
                cut.add(next_token_loss(output.logits, input_ids, "mean"))

    language = whole.mean()
    through_state = [a - b for a, b in zip(language, cut.mean(), strict=True)]
    both = [a + b for a, b in zip(language, balance.mean(), strict=True)]
    count = len(layers)
    return GradientSplit(
        step=[step],
        language_model=[norms(language, owned)[:count]],
        balance=[norms(balance.mean(), owned)[:count]] if balance.count else None,
        language_model_cut=[norms(cut.mean(), owned)[:count]] if cut.count else None,
        recurrent=[norms(through_state, owned)[:count]] if cut.count else None,
        shared=[norms(both, owned)[count]] if shared is not None else None,
        tokens=sum(batch.numel() for batch in batches),
    )
