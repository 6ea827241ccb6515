"""Balance losses: pure functions of one layer's `Routing`. The mean over layers is added to the training loss.

Each takes `(spec, view)` and gives a scalar. Layers are never pooled before a product: pooled, too much load on an
expert in one layer would cancel too little in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.routing import mechanisms as options
from rmoe.routing.contract import RouterContext, Routing, count_assignments
from rmoe.routing.router import BaseRouter, SharedRouter
from rmoe.routing.spec import RouterSpec


class LayerView(NamedTuple):
    """What a balance loss may look at.

    Attributes:
        routing: the layer's decision for this micro-batch.
        context: mask and shape of the micro-batch.
        counts: `[E]`, the assignments whose shares the loss uses (`BalanceSpec.scope`).
        num_experts: `E`.
        top_k: `k`.
        experts_matrix: `[C, f]` or None.
    """

    routing: Routing
    context: RouterContext
    counts: Tensor
    num_experts: int
    top_k: int
    experts_matrix: Tensor | None


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of `[T, *]`."""
    if mask is None:
        return values.mean(0)
    return torch.einsum("t...,t->...", values, mask.to(values.dtype)) / mask.sum().clamp(min=1)


def load_balance(spec: options.LoadBalance, view: LayerView) -> Tensor:
    """`E sum_n f_n P_n`: `f_n` share of assignments to expert n, `P_n` its mean probability (Switch, Eq. 4 to 6).

    With `count="assignments"` the `f_n` sum to 1 and perfect balance gives 1; with "tokens" `f_n` is the share of
    tokens, k times as large (OLMoE's and transformers' codes differ by this factor). The gradient flows through `P`.
    """
    experts = view.num_experts
    mean = masked_mean(view.routing.probs[:, :experts], view.context.mask)
    counts = view.counts.to(mean.dtype)
    share = counts / counts.sum().clamp(min=1)
    scale = experts * (view.top_k if spec.count == "tokens" else 1)
    return scale * (share * mean).sum()


def z_loss(spec: options.ZLoss, view: LayerView) -> Tensor:
    """`mean_t logsumexp(logits_t)^2` (ST-MoE, Eq. 5)."""
    return masked_mean(torch.logsumexp(view.routing.logits, -1).square(), view.context.mask)


def sequence_balance(spec: options.SequenceBalance, view: LayerView) -> Tensor:
    """`mean_b E sum_n f_bn P_bn` within each sequence b (DeepSeek-V3, Eq. 17 to 20); `f_b` sums to 1."""
    experts, batch, length = view.num_experts, view.context.batch, view.context.length
    mask = view.context.mask
    real = torch.ones_like(view.routing.probs[:, 0]) if mask is None else mask.to(view.routing.probs.dtype)
    owner = torch.arange(batch, device=real.device).repeat_interleave(length)[:, None] * (experts + 1)
    chosen = (owner + view.routing.experts).reshape(-1)
    weights = real[:, None].expand_as(view.routing.experts).reshape(-1)
    load = torch.zeros(batch * (experts + 1), dtype=real.dtype, device=real.device).scatter_add(
        0, chosen, weights
    )
    load = load.view(batch, experts + 1)[:, :experts]
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    real = real.view(batch, length)
    probs = view.routing.probs[:, :experts].view(batch, length, experts)
    mean = torch.einsum("bsn,bs->bn", probs, real) / real.sum(-1, keepdim=True).clamp(min=1)
    per_sequence = experts * (share * mean).sum(-1)
    present = (real.sum(-1) > 0).to(mean.dtype)
    return (per_sequence * present).sum() / present.sum().clamp(min=1)


def mutual_information(spec: options.MutualInformation, view: LayerView) -> Tensor:
    """`-(H(mean_t p_t) - mean_t H(p_t))` in nats (ModuleFormer): lower when experts are used evenly and surely."""
    probs, mask = view.routing.probs, view.context.mask
    marginal = torch.special.entr(masked_mean(probs, mask)).sum()
    return masked_mean(torch.special.entr(probs).sum(-1), mask) - marginal


def similarity_preserving(spec: options.SimilarityPreserving, view: LayerView) -> Tensor:
    """`|| R R^T - I ||_1 / E^2`, `R` `[E, f]` the scorer's expert vectors (2506.14038); over `E^2` is our scaling."""
    if view.experts_matrix is None:
        raise ValueError("similarity_preserving needs a scorer with an experts matrix")
    matrix = view.experts_matrix.to(torch.promote_types(view.experts_matrix.dtype, torch.float32))
    gram = matrix @ matrix.T
    return (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).abs().mean()


def counts_in_scope(spec: RouterSpec, own: Tensor, earlier: Tensor | None, training: bool) -> Tensor:
    """The assignment counts the losses use, `[L, E]`, without gradient.

    Args:
        spec: `balance.scope` decides.
        own: this micro-batch's.
        earlier: this rank's of the earlier micro-batches of this optimizer step; or None.
        training: ranks add up their counts in training only, since an evaluation may run on one of them.
    """
    if spec.balance.scope == "micro_batch":
        return own
    counts = own.clone() if earlier is None else own + earlier
    if training and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


def balance_loss(
    routers: Sequence[BaseRouter],
    routings: Sequence[Routing],
    shared: SharedRouter | None,
    context: RouterContext,
    coefficient: float,
    earlier: Tensor | None = None,
) -> Tensor:
    """The weighted sum of all balance losses and the mechanisms' own penalties, each the mean over layers.

    Args:
        routers: the routing layers, in order.
        routings: their decisions.
        shared: what they share.
        context: mask and shape of the micro-batch.
        coefficient: weight of losses whose own weight is None (the model's `router_aux_loss_coef`).
        earlier: `[L, E]` of this rank's earlier micro-batches, see `counts_in_scope`.

    Returns:
        Scalar, at least float32; zero when the router has no balance loss.
    """
    spec, num_experts = routers[0].spec, routers[0].num_experts
    with torch.no_grad():
        own = torch.stack([count_assignments(r.experts, num_experts, context.mask) for r in routings])
        counts = counts_in_scope(spec, own, earlier, routers[0].training)
    total = routings[0].probs.new_zeros(())
    for layer, (router, routing) in enumerate(zip(routers, routings, strict=True)):
        matrix = router.experts_matrix(shared)
        top_k = router.geometry.top_k
        view = LayerView(routing, context, counts[layer], num_experts, top_k, matrix)
        for loss, function in router.losses:
            weight = getattr(loss, "weight", None)
            total = total + (coefficient if weight is None else weight) * function(loss, view)
        if routing.penalty is not None:
            total = total + routing.penalty
    return total / len(routings)
