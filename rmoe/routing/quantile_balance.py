"""Quantile balancing: the bias that would have balanced the last step's tokens, with no rate to tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rmoe.routing.balance import SelectionBias
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State
from rmoe.routing.gate import TopK
from rmoe.routing.options import Geometry
from rmoe.routing.router import Router, SharedRouter
from rmoe.routing.threshold_gates import quantile
from rmoe.validation import require

if TYPE_CHECKING:
    from rmoe.routing.spec import RouterSpec


class QuantileBias(SelectionBias):
    """`b`, float32, `[E]`: a selection bias that is set anew after each step, not moved by a rate."""

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        if stats.observed is not None:
            self.bias.copy_(-stats.observed[layer, : self.num_experts] / stats.tokens.clamp(min=1))


class QuantileBalanced(Router):
    """Top-k of `s + b`, `b` from one alternation of two quantiles per step (kexue.fm/archives/11619; marin #3406).

    `a_t = quantile_{1 - k/E}` over experts of `s_t + b`; `beta_n = quantile_{1 - k/E}` over tokens of `s_n - a`;
    `b <- -beta`. Weights are the scores' own, without b. Several micro-batches or ranks: the mean of their beta over
    tokens, as Megatron-LM does it.
    """

    class Config(Router.Config):
        kind = "quantile_balanced"
        equation = "chosen by s + b, b = -quantile over tokens of (s - quantile over experts of (s + b))"
        moves = True
        takes_zero_experts = False

    options: Config

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        gate = spec.gate
        by_logits = isinstance(gate, TopK.Config) and gate.choose_by == "logits" and gate.groups == 1
        plain = by_logits and gate.softcap is None and gate.multiplier == 1  # type: ignore[union-attr]
        plain = plain and gate.start_k is None  # type: ignore[union-attr]
        allowed = "top_k by plain logits, with a k that stays, with router quantile_balanced"
        require(plain, "router.gate", gate.described() if gate is not None else None, allowed)
        one = spec.balance.bias_update_rate == 0 and not spec.skips
        rate = spec.balance.bias_update_rate
        require(
            one, "balance.bias_update_rate", rate, "0, without a skip class, with router quantile_balanced"
        )
        super().__init__(options, spec, geometry)
        self.selection_bias: QuantileBias = QuantileBias(spec.balance, geometry, skip_class=False)

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        routing, state = super().route(hidden, state, shared, context)
        if not self.training:
            return routing, state
        with torch.no_grad():
            s = routing.logits if self.temperature is None else self.temperature(routing.logits)
            share = 1 - self.top_k / self.num_experts
            bar = quantile((s + self.selection_bias.bias).mT, share)  # [T]
            beta = quantile(s - bar[:, None], share, context.mask)
            tokens = torch.full((), s.shape[0]) if context.mask is None else context.mask.sum()
            return routing._replace(observed=beta * tokens.to(beta.device)), state
