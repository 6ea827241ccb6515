"""The router of one layer: recurrence, scorer, gate, in this order.

`router(hidden, state, shared, context) -> (Routing, state)`. What all layers share is built once, by
`build_shared`, belongs to the model, and is passed down: registered inside every layer, FSDP2 fails on it. Routers
that add something between scorer and gate are in `score_routers.py`, those that read token ids in `token_routers.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rmoe.routing.balance import SelectionBias, limit_capacity
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State
from rmoe.routing.initial import PassedModule
from rmoe.routing.options import Geometry, Mechanism, Options
from rmoe.routing.step_state import StepState
from rmoe.routing.temperature import Temperature
from rmoe.routing.zero_experts import ZeroExperts
from rmoe.validation import NotNegativeInt, Share, require

if TYPE_CHECKING:
    from rmoe.routing.spec import RouterSpec


class SharedRouter(PassedModule):
    """What the routers of all layers have in common: the cell and projector, the scorers of layer groups."""

    def __init__(self, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__()
        scorer, features = spec.scorer, spec.recurrence.features(geometry)
        self.recurrence = spec.recurrence.build_shared(geometry)
        scored = spec.router.scored(geometry)
        self.scorer = None if scorer is None else scorer.build_shared(scored, features)


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


class BaseRouter(StepState, Mechanism):
    """Contract of all routers, and what every one has: its spec, its capacity limit, its training state.

    Built from (options, spec, geometry). What does not fit three stages is a subclass.
    """

    class Config(Options):
        stage = "router"

        @property
        def uses_scorer(self) -> bool:
            """Whether it has a scorer; the spec's is None where not."""
            return True

        @property
        def uses_gate(self) -> bool:
            """Whether it has a gate; the spec's is None where not."""
            return True

        @property
        def needs_token_ids(self) -> bool:
            return False

        @property
        def is_causal(self) -> bool:
            """Whether no token's routing depends on a later token's."""
            return True

        @property
        def reads_sequence(self) -> bool:
            """Whether it needs a token's earlier tokens in the same call: it cannot work behind a cache."""
            return False

        @property
        def reach(self) -> int:
            """How many MoE layers below a layer change its work; above so many, layers are alike (`rmoe plan`)."""
            return 1

        def built_experts(self, geometry: Geometry) -> int:
            """How many experts the model builds per layer; a router that never leaves the first few needs no more."""
            return geometry.num_experts

        @property
        def has_zero_experts(self) -> bool:
            """Whether a token may choose experts that compute nothing."""
            return False

        @property
        def scores_hidden(self) -> bool:
            """Whether the scorer is given the hidden state itself, where no recurrence is before it."""
            return True

        @property
        def weighs_inputs(self) -> bool:
            """Whether a weight multiplies its expert's input instead of its output."""
            return False

        @property
        def shared_classes(self) -> int:
            """Shared experts that it weighs per token; 0 leaves them unweighted."""
            return 0

        def chosen_from(self, geometry: Geometry) -> Geometry:
            """What the gate is built for: `num_experts` counts all classes it chooses from."""
            return geometry

        def scored(self, geometry: Geometry) -> Geometry:
            """What the scorer is built for: `num_experts` counts all classes it scores."""
            return self.chosen_from(geometry)

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__()
        self.options, self.spec, self.geometry = options, spec, geometry
        self.num_experts, self.layer_index = geometry.num_experts, geometry.layer_index

    @property
    def top_k(self) -> int:
        """k of this layer; a gate that asks as many experts as it likes has the model's."""
        return self.geometry.top_k

    @property
    def current_k(self) -> int | Tensor:
        """k of this layer at this step: below `top_k` while a gate's k grows, and then a tensor."""
        return self.top_k

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
            factor = self.spec.balance.capacity_factor
            if factor is not None:
                routing = limit_capacity(routing, factor, self.num_experts, self.current_k, context.mask)
            if any(loss.reads_experts_matrix for loss in self.spec.balance.losses):
                matrix = self.experts_matrix(shared)
                # A copy: of FSDP2's a layer has the whole weights only while it runs, and the losses come after.
                routing = routing._replace(experts_matrix=None if matrix is None else matrix.clone())
        return routing, state

    @torch.no_grad()
    def update_all(self, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move all training-time state of this layer's router, once per optimizer step."""
        device = next((buffer.device for buffer in self.buffers()), stats.counts.device)
        stats = stats.map(lambda part: part.to(device))
        for module in self.modules():
            if isinstance(module, StepState):
                module.update(self.layer_index, stats, step, total_steps)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Router arithmetic stays in float32 under autocast too; the meta device, which plans are made on, has none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Router(BaseRouter):
    """Recurrence, scorer, gate: Eq. 4, 5 and 6, and with recurrence "none" Eq. 1."""

    class Config(BaseRouter.Config):
        """Attributes:
        input_jitter: in training the router's input is multiplied by U(1 - e, 1 + e) (Switch, 2101.03961).
        weight_on: whether a weight multiplies its expert's output, or its input (Llama 4).
        identity_experts, zero_experts, constant_experts: how many experts more there are that give `x`, 0, and a
            mix of `x` and a learned vector (MoE++; LongCat), see `ZeroExperts`.
        """

        kind = "staged"

        input_jitter: Share = 0.0
        weight_on: Literal["output", "input"] = "output"
        identity_experts: NotNegativeInt = 0
        zero_experts: NotNegativeInt = 0
        constant_experts: NotNegativeInt = 0

        takes_zero_experts = True  # those three; a subclass may have no place for them

        @property
        def equation(self) -> str:
            identity, zero, constants = self.identity_experts, self.zero_experts, self.constant_experts
            parts = ["y = sum E_n(g_n x)"] if self.weighs_inputs else []
            parts += [f"{identity} experts are x"] if identity else []
            parts += [f"{zero} experts are 0"] if zero else []
            parts += [f"{constants} experts are a_1 x + a_2 v"] if constants else []
            return "; ".join(parts)

        @property
        def has_zero_experts(self) -> bool:
            return self.identity_experts + self.zero_experts + self.constant_experts > 0

        def check(self) -> None:
            fits = self.takes_zero_experts or not self.has_zero_experts
            require(fits, "router.kind", self.kind, "staged, with zero experts")

        @property
        def weighs_inputs(self) -> bool:
            return self.weight_on == "input"

        def chosen_from(self, geometry: Geometry) -> Geometry:
            more = self.identity_experts + self.zero_experts + self.constant_experts
            return replace(geometry, num_experts=geometry.num_experts + more)

        @property
        def uses_noise(self) -> bool:
            return self.input_jitter > 0

        def described(self) -> str:
            text = super().described()
            return "" if text == "staged" else text

    options: Config

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        assert spec.scorer is not None  # RouterSpec has checked both
        assert spec.gate is not None
        features = spec.recurrence.features(geometry)
        self.recurrence: Any = spec.recurrence.build(geometry)
        self.scorer: Any = spec.scorer.build(options.scored(geometry), features)
        self.temperature = None if spec.temperature.is_off else Temperature(spec.temperature)
        skip_class = spec.scorer.skip_class
        biased = skip_class or spec.balance.bias_update_rate > 0
        more = options.identity_experts, options.zero_experts, options.constant_experts
        bias = SelectionBias(spec.balance, geometry, skip_class, zero_experts=sum(more)) if biased else None
        self.selection_bias = bias
        self.gate: Any = spec.gate.build(options.chosen_from(geometry))
        self.zero_experts = ZeroExperts(*more, geometry) if options.has_zero_experts else None

    @property
    def top_k(self) -> int:
        own: int | None = getattr(self.gate, "layer_k", None)
        return own or self.geometry.top_k

    @property
    def current_k(self) -> int | Tensor:
        grown: Tensor | None = getattr(self.gate, "current_k", None)
        return self.top_k if grown is None else grown

    def experts_matrix(self, shared: SharedRouter | None) -> Tensor | None:
        return self.scorer.experts_matrix(shared.scorer if shared is not None else None)

    def score(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Tensor, Tensor, State]:
        """Features `[T, f]`, raw logits `[T, C]`, and the recurrent state."""
        if self.options.input_jitter and context.noise is not None:
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = wide * (1 + self.options.input_jitter * (2 * context.noise.uniform(wide) - 1))
        features, state = self.recurrence(
            hidden, state, shared=shared.recurrence if shared is not None else None
        )
        logits = self.scorer(
            features, shared=shared.scorer if shared is not None else None, noise=context.noise
        )
        return features, logits.to(hidden.device), state  # a shared scorer may be on another device

    def decide(self, logits: Tensor, context: RouterContext) -> Routing:
        """Temperature, bias and gate on raw logits, which the result keeps as they are."""
        scaled = logits if self.temperature is None else self.temperature(logits)
        bias = None if self.selection_bias is None else self.selection_bias.bias
        return self.gate(scaled, bias, context)._replace(logits=logits)

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        _, logits, state = self.score(hidden, state, shared, context)
        return self.settle(self.decide(logits, context), hidden), state

    def settle(self, routing: Routing, hidden: Tensor) -> Routing:
        """What a gate decided over all classes, with experts that compute nothing as what they give."""
        return routing if self.zero_experts is None else self.zero_experts(routing, hidden)
