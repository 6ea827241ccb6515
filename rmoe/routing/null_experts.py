"""AdaMoE: null experts in the top-k let a token ask fewer real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from rmoe.routing.contract import Routing
from rmoe.routing.losses import Loss, LossView, masked_mean
from rmoe.routing.router import Router
from rmoe.validation import PositiveInt, require


class NullExperts(Router):
    """The k of a token are chosen among E experts and `zero_experts` null ones, which give nothing (2406.13233).

    The weights of the real experts are divided by their own sum, as AdaMoE's code does: a null expert takes a slot
    and no weight. A token whose every choice is null gets nothing.
    """

    class Config(Router.Config):
        kind = "null_experts"
        equation = "top_k(softmax(s)) among E experts and null ones; g / sum over the real"

        zero_experts: PositiveInt = 8

        def check(self) -> None:
            super().check()
            alone = self.identity_experts + self.constant_experts == 0
            require(alone, "router.identity_experts", self.identity_experts, "0 with router null_experts")

    options: Config

    def settle(self, routing: Routing, hidden: Tensor) -> Routing:
        routing = super().settle(routing, hidden)
        total = routing.weights.sum(-1, keepdim=True)
        weights = routing.weights / total.clamp(min=torch.finfo(total.dtype).tiny)
        return routing._replace(weights=weights, passthrough=None)


class NullBalance(Loss):
    """`C sum_c f_c P_c` over all C classes, where each null expert's share is the null experts' mean (AdaMoE).

    So how often a token asks null experts is kept near its even share, but which null expert does not matter.
    """

    kind = "null_balance"

    def __call__(self, view: LossView) -> Tensor:
        mean = masked_mean(view.probs, view.context.mask)  # [L, C]
        classes, experts = mean.shape[-1], view.num_experts
        empty = (view.experts == experts).to(mean.dtype).mean(-1)  # [L, T]
        null = masked_mean(empty, view.context.mask)  # [L], share of choices that are null
        counts = view.counts.to(mean.dtype)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1) * (1 - null[:, None])
        nulls = null * mean[:, experts:].mean(-1) if classes > experts else 0.0
        return classes * ((share * mean[:, :experts]).sum(-1) + nulls)
