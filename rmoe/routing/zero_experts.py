"""Experts that compute nothing: classes behind the E experts that a gate chooses among as among the others.

And how often they are asked: MoE++'s balance loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.contract import Routing
from rmoe.routing.initial import Initialized, Initializer, constant, linear_fp32, normal
from rmoe.routing.losses import Loss, LossView, masked_mean, real_tokens, shares_chosen
from rmoe.routing.options import Geometry
from rmoe.validation import Positive


class ZeroExperts(Initialized):
    """Identity experts `x`, zero experts `0`, constant experts `a_1 x + a_2 v`, `a = softmax(W_c x)`; in this order.

    They take a token's slot and its weight, as the others do. What they add to the output is in the routing:
    `passthrough` times the input, and `added`. The slot itself is then empty. `v` starts at zero.
    Source: MoE++, 2410.07348 (all three); LongCat-Flash, 2509.01322 (identity).

    Args:
        identity, zero, constants: how many there are of each.
        geometry: the model's sizes.
    """

    mixes: Tensor | None
    constant_values: Tensor | None

    def __init__(self, identity: int, zero: int, constants: int, geometry: Geometry) -> None:
        super().__init__()
        self.identity, self.zero, self.constants = identity, zero, constants
        self.num_experts = geometry.num_experts
        self.std = geometry.initializer_range
        mixes = torch.empty(constants, 2, geometry.hidden_size) if constants else None
        values = torch.empty(constants, geometry.hidden_size) if constants else None
        self.register_parameter("mixes", None if mixes is None else nn.Parameter(mixes))
        self.register_parameter("constant_values", None if values is None else nn.Parameter(values))

    def initializers(self) -> dict[str, Initializer]:
        return {"mixes": normal(self.std), "constant_values": constant(0.0)}

    def forward(self, routing: Routing, hidden: Tensor) -> Routing:
        """The routing with what these experts give, their slots empty.

        Args:
            routing: over all classes; an index beyond them is an empty slot already.
            hidden: `[T, d]`, the layer's input.
        """
        count = self.identity + self.zero + self.constants
        behind = routing.experts - self.num_experts
        column = torch.where(behind < 0, count, behind.clamp(max=count))
        by_class = torch.zeros_like(routing.weights[:, :1]).expand(-1, count + 1)
        by_class = by_class.scatter_add(1, column, routing.weights)  # the last column is cut off
        copied = by_class[:, : self.identity]
        mixed = by_class[:, self.identity + self.zero : count]
        passthrough, added = copied.sum(-1), None
        if self.mixes is not None and self.constant_values is not None:
            scores = linear_fp32(hidden, self.mixes.flatten(0, 1)).unflatten(-1, (-1, 2))  # [T, constants, 2]
            own = F.softmax(scores, -1) * mixed[..., None]
            passthrough = passthrough + own[..., 0].sum(-1)
            added = own[..., 1] @ self.constant_values.to(own.dtype)
        return routing._replace(
            weights=routing.weights.masked_fill(behind >= 0, 0.0),
            experts=routing.experts.clamp(max=self.num_experts),
            passthrough=passthrough,
            added=added,
            classes=routing.experts,
        )


class HeterogeneousBalance(Loss):
    """`C sum_c eta_c f_c P_c` over all C classes; eta is 1 for an expert and `tau` for one that computes nothing.

    `f_c` is the share of all choices that fell on class c, so that perfect balance at tau 1 gives 1, as with
    `LoadBalance`; below 1 more of them may fall on experts that compute nothing. Source: MoE++, 2410.07348, Eq. 7.
    Deviations: Eq. 7 counts tokens and has no C, which makes it k / C of this; with scope "global_batch" how choices
    divide among the E experts is the whole batch's, how many are theirs is this micro-batch's.
    """

    kind = "heterogeneous_balance"

    tau: Positive = 0.75

    def __call__(self, view: LossView) -> Tensor:
        mean = masked_mean(view.probs, view.context.mask)  # [L, C]
        experts, classes = view.num_experts, mean.shape[-1]
        share = shares_chosen(view.classes, classes, real_tokens(view))
        among = view.counts.to(mean.dtype) / view.counts.sum(-1, keepdim=True).clamp(min=1)
        computing = among * share[:, :experts].sum(-1, keepdim=True) * mean[:, :experts]
        return classes * (computing.sum(-1) + self.tau * (share * mean)[:, experts:].sum(-1))
