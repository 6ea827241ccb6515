"""Routers of released models that do not fit three stages: gated shared experts, and a table of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.contract import RouterContext, Routing, State
from rmoe.routing.gate import TopK
from rmoe.routing.initial import Initializer, constant
from rmoe.routing.options import Geometry
from rmoe.routing.router import Router, SharedRouter
from rmoe.routing.token_routers import expert_table, token_ids
from rmoe.validation import NotNegativeInt, Positive, PositiveInt, require

if TYPE_CHECKING:
    from rmoe.routing.spec import RouterSpec


class SharedInSoftmax(Router):
    """`g = c a softmax([log sig(s_chosen), log sig(s_shared)])`: shared experts are gated with the routed ones.

    The gate chooses among the routed experts; the weights are over the chosen and all shared, times a factor `c` and a
    learned one `a`, 1 at the start. In a model without shared experts they take their part of the weight all the same
    (a sink). Source: transformers' `InklingTopkRouter`.
    """

    class Config(Router.Config):
        """Attributes:
        shared_experts: `S`, how many; the model's `num_shared_experts`, or that is 0.
        scale: `c` (`route_scale`).
        """

        kind = "shared_in_softmax"
        takes_zero_experts = False

        shared_experts: PositiveInt = 2
        scale: Positive = 8.0

        @property
        def equation(self) -> str:
            return f"[g, g_shared] = {self.scale:g} a softmax(log sig([s_chosen, s_shared]))"

        @property
        def shared_classes(self) -> int:
            return self.shared_experts

        def scored(self, geometry: Geometry) -> Geometry:
            return replace(geometry, num_experts=geometry.num_experts + self.shared_experts)

    options: Config

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        _require_top_k(self)
        empty = self.gate.options.leaves_empty_slots or spec.skips
        require(not empty, "router.gate", self.gate.options.kind, f"a fixed k with router {options.kind}")
        unread = TopK.Config()
        for name in ("scale", "multiplier", "softcap", "expert_scale"):  # the weights are this router's own
            value, default = getattr(self.gate.options, name, None), getattr(unread, name)
            require(value in (None, default), f"gate.{name}", value, f"{default} with router {options.kind}")
        self.global_scale = nn.Parameter(torch.empty(1))

    def initializers(self) -> dict[str, Initializer]:
        return {"global_scale": constant(1.0)}

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        _, logits, state = self.score(hidden, state, shared, context)
        routed = logits[..., : self.num_experts]
        routing = self.decide(routed, context)
        scaled = logits if self.temperature is None else self.temperature(logits)
        chosen = scaled[..., : self.num_experts].gather(-1, routing.experts)
        log_scores = F.logsigmoid(torch.cat((chosen, scaled[..., self.num_experts :]), -1))
        weights = torch.exp(log_scores - torch.logsumexp(log_scores, -1, keepdim=True))
        weights = weights * self.options.scale * self.global_scale.to(weights.dtype)
        k = chosen.shape[-1]
        return routing._replace(weights=weights[..., :k], shared_weights=weights[..., k:]), state


class TableTopK(Router):
    """The first layers choose by a fixed table of token ids, and weigh by the learned scores; the others are plain.

    Source: DeepSeek-V4, transformers' `DeepseekV4HashRouter`. The table is that of router "hash".
    """

    class Config(Router.Config):
        """Attributes:
        table_layers: how many MoE layers choose by the table (3 in DeepSeek-V4).
        table_seed: of the table.
        """

        kind = "table_top_k"
        equation = "n = table[token] in the first layers"
        needs_token_ids = True
        takes_zero_experts = False

        table_layers: NotNegativeInt = 3
        table_seed: NotNegativeInt = 0

    options: Config
    table: Tensor | None

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        _require_top_k(self)
        self.by_table = geometry.layer_index < options.table_layers
        if self.by_table:
            self.selection_bias = None  # there is nothing to choose
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        table = expert_table(self.options.table_seed, self.geometry) if self.by_table else None
        return {"table": table}

    def resize_vocabulary(self, vocab_size: int) -> None:
        """A token's row depends on its id alone: the old ones stay, and new ones are as if they had been there."""
        super().resize_vocabulary(vocab_size)
        if self.table is not None:
            self.table = expert_table(self.options.table_seed, self.geometry).to(self.table.device)

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        if self.table is None:
            return super().route(hidden, state, shared, context)
        _, logits, state = self.score(hidden, state, shared, context)
        scaled = logits if self.temperature is None else self.temperature(logits)
        experts = self.table[token_ids(context, self.options.kind)]
        return self.gate.given(scaled, experts)._replace(logits=logits), state


def _require_top_k(router: Router) -> None:
    kind = router.spec.gate.kind if router.spec.gate is not None else None
    fits = isinstance(router.gate, TopK)
    require(fits, "router.gate", kind, f"top_k, softmax or sigmoid with router {router.options.kind}")
