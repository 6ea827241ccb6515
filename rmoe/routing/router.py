"""The router of one layer: the stages in order, and those that need a little more than three stages.

`router(hidden, state, shared, context) -> (Routing, state)`. What all layers share is built once, by
`build_shared`, belongs to the model, and is passed down: registered inside every layer, FSDP2 fails on it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing import mechanisms as options
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State
from rmoe.routing.initial import PassedModule, ProjectionFP32, constant
from rmoe.routing.recurrence import SharedRecurrence
from rmoe.routing.scorer import SharedLinear
from rmoe.routing.spec import BalanceSpec, Geometry, RouterSpec
from rmoe.routing.training_state import SelectionBias, Temperature, TrainingState


class SharedRouter(PassedModule):
    """What the routers of all layers have in common: the cell and projector, the scorers of layer groups."""

    def __init__(self, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__()
        recurrence, scorer = spec.recurrence, spec.scorer
        self.recurrence: nn.Module | None = None
        self.scorer: nn.Module | None = None
        if isinstance(recurrence, options.Recurrence) and recurrence.has_shared:
            self.recurrence = SharedRecurrence(recurrence, geometry)
        if isinstance(scorer, options.Linear) and scorer.shared_layers != 1:
            self.scorer = SharedLinear(scorer, geometry, recurrence.features(geometry))


def build_shared(spec: RouterSpec, geometry: Geometry) -> SharedRouter | None:
    """The module the model owns for its routers; None when they share nothing."""
    shared = SharedRouter(spec, geometry)
    return shared if shared.state_dict() else None


def build_router(spec: RouterSpec, geometry: Geometry) -> BaseRouter:
    """The router of one layer.

    Raises:
        RequestError: the spec cannot work at these sizes.
    """
    spec.check_geometry(geometry)
    router = spec.router.build(spec, geometry)
    assert isinstance(router, BaseRouter), f"{spec.router.kind} builds no BaseRouter"
    return router


class BaseRouter(TrainingState):
    """Contract of all routers, and what every one has: its spec, its capacity limit, its training state."""

    def __init__(self, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__()
        self.spec, self.geometry = spec, geometry
        self.num_experts, self.layer_index = geometry.num_experts, geometry.layer_index
        self.losses = [(loss, loss.load_implementation()) for loss in spec.balance.losses]  # see balance.py

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        """The decision before the capacity limit."""
        raise NotImplementedError

    def experts_matrix(self, shared: SharedRouter | None) -> Tensor | None:
        """What tokens are compared with, `[C, f]`; None where there is no such matrix."""
        return None

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Called when the model's vocabulary changes; routers that read token ids adapt what they have of it."""
        self.geometry = replace(self.geometry, vocab_size=vocab_size)

    def forward(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        """Route `T` tokens.

        Args:
            hidden: `[T, d]`, any floating dtype; arithmetic is in at least float32.
            state: from the MoE layer below; `()` in the first.
            shared: the model's `build_shared` module.
            context: mask, token ids, noise.

        Returns:
            The decision, and the state for the MoE layer above.
        """
        if context.noise is not None:
            context = context._replace(noise=context.noise.for_layer(self.layer_index))
        with without_autocast(hidden.device.type):
            routing, state = self.route(hidden, state, shared, context)
            if self.spec.balance.capacity_factor is not None:
                routing = limit_capacity(routing, self.spec.balance, self.geometry, context.mask)
        return routing, state

    @torch.no_grad()
    def update_all(self, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move all training-time state of this layer's router, once per optimizer step."""
        for module in self.modules():
            if isinstance(module, TrainingState):
                module.update(self.layer_index, stats, step, total_steps)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Router arithmetic stays in float32 under autocast too; the meta device, which plans are made on, has none."""
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def limit_capacity(routing: Routing, spec: BalanceSpec, geometry: Geometry, mask: Tensor | None) -> Routing:
    """Drop each expert's assignments beyond `ceil(factor * T * k / E)`, first come first served in token order.

    `T` counts real tokens. The position of an assignment in its expert's queue comes from a stable sort: no
    `[T * K, E]` one-hot tensor, no host synchronisation.
    """
    experts = geometry.num_experts
    flat = routing.experts if mask is None else routing.experts.masked_fill(~mask[:, None], experts)
    flat = flat.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    first = torch.searchsorted(ordered, ordered)  # where each one's queue begins
    position = torch.empty_like(flat).scatter(
        0, order, torch.arange(flat.numel(), device=flat.device) - first
    )
    tokens = routing.experts.shape[0] if mask is None else mask.sum()
    factor = spec.capacity_factor or 0.0
    capacity = torch.ceil(torch.as_tensor(tokens, dtype=torch.float64) * (factor * geometry.top_k / experts))
    dropped = (position >= capacity.to(flat.device)).view_as(routing.experts) & (routing.experts < experts)
    if mask is not None:
        dropped = dropped & mask[:, None]
    return routing._replace(weights=routing.weights.masked_fill(dropped, 0.0), dropped=dropped)


class Router(BaseRouter):
    """Recurrence, scorer, gate: Eq. 4, 5 and 6, and with recurrence "none" Eq. 1."""

    def __init__(self, kind: options.Staged, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(spec, geometry)
        assert spec.scorer is not None  # RouterSpec has checked both
        assert spec.gate is not None
        self.input_jitter = kind.input_jitter
        features = spec.recurrence.features(geometry)
        self.recurrence: Any = spec.recurrence.build(geometry)
        self.scorer: Any = spec.scorer.build(geometry, features)
        self.temperature = None if spec.temperature.is_off else Temperature(spec.temperature)
        skip_class = bool(getattr(spec.scorer, "skip_class", False))
        biased = skip_class or spec.balance.bias_update_rate > 0
        self.selection_bias = SelectionBias(spec.balance, geometry, skip_class) if biased else None
        self.gate: Any = spec.gate.build(geometry)

    def experts_matrix(self, shared: SharedRouter | None) -> Tensor | None:
        return self.scorer.experts_matrix(shared.scorer if shared is not None else None)

    def score(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Tensor, Tensor, State]:
        """Features `[T, f]`, raw logits `[T, C]`, and the recurrent state."""
        if self.input_jitter and context.noise is not None:
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = wide * (1 + self.input_jitter * (2 * context.noise.uniform(wide) - 1))
        features, state = self.recurrence(
            hidden, state, shared=shared.recurrence if shared is not None else None
        )
        logits = self.scorer(
            features, shared=shared.scorer if shared is not None else None, noise=context.noise
        )
        return features, logits, state

    def decide(self, logits: Tensor, context: RouterContext) -> Routing:
        """Temperature, bias and gate on raw logits, which the result keeps as they are."""
        scaled = logits if self.temperature is None else self.temperature(logits)
        bias = None if self.selection_bias is None else self.selection_bias.bias
        return self.gate(scaled, bias, context)._replace(logits=logits)

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        _, logits, state = self.score(hidden, state, shared, context)
        return self.decide(logits, context), state


class ResidualScores(Router):
    """`logits_i = G_i h_i + a (G_{i-1} h_{i-1})` (Table 5): the state also carries the last layer's own scores.

    The scores carried are the layer's own, before the residual is added, as the table's formula has it.
    """

    def __init__(self, kind: options.ResidualScores, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(kind, spec, geometry)
        self.scale, self.detach = kind.scale, kind.detach

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        below, recurrent = state[:1], state[1:]
        _, own, recurrent = self.score(hidden, recurrent, shared, context)
        logits = own
        if below:
            logits = own + self.scale * (below[0].detach() if self.detach else below[0])
        return self.decide(logits, context), (own, *recurrent)


class NoisyTopK(Router):
    """`H = x G + N(0, 1) * (softplus(x W_n) + 1e-2)`, top-k, softmax over the k (Shazeer et al. 2017, Eq. 3 to 5).

    Losses: squared coefficient of variation of the importance `sum_x g_n` and of the load, the sum of the
    probability that expert n stays among the k when its own noise is drawn again (their appendix A).
    From memory: zero initial weights for both maps there, weights 0.1. Here the scorer keeps the model's own
    initialisation, so that it starts as every other router does; the noise map starts at zero.
    """

    def __init__(self, kind: options.NoisyTopK, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(kind, spec, geometry)
        self.importance_weight, self.load_weight = kind.importance_weight, kind.load_weight
        features = spec.recurrence.features(geometry)
        self.noise_map = ProjectionFP32(features, geometry.num_experts, constant(0.0))

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        features, clean, state = self.score(hidden, state, shared, context)
        if context.noise is None:
            return self.decide(clean, context), state
        std = F.softplus(self.noise_map(features)) + 1e-2
        noisy = clean + std * context.noise.normal(clean)
        routing = self.decide(noisy, context)
        return routing._replace(
            logits=clean, penalty=self._penalty(clean, noisy, std, routing, context)
        ), state

    def _penalty(
        self, clean: Tensor, noisy: Tensor, std: Tensor, routing: Routing, context: RouterContext
    ) -> Tensor:
        real = 1.0 if context.mask is None else context.mask[:, None]
        experts = torch.where(routing.experts < self.num_experts, routing.experts, 0)
        importance = torch.zeros_like(clean).scatter_add(-1, experts, routing.weights)
        penalty = self.importance_weight * _squared_variation((importance * real).sum(0))
        if self.geometry.top_k < self.num_experts:
            top = noisy.topk(self.geometry.top_k + 1, -1).values
            inside = noisy > top[:, -1:]
            # The bar to clear is the k-th best of the others: one lower for an expert already inside.
            bar = torch.where(inside, top[:, -1:], top[:, -2:-1])
            load = torch.special.ndtr((clean - bar) / std)
            penalty = penalty + self.load_weight * _squared_variation((load * real).sum(0))
        return penalty


def _squared_variation(per_expert: Tensor) -> Tensor:
    """`Var / Mean^2` over experts, population variance."""
    mean = per_expert.mean()
    return per_expert.var(correction=0) / (mean * mean + 1e-10)
