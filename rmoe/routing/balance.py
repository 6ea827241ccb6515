"""Balance losses: pure functions of the layers' `Routing`. Their mean over layers is added to the training loss.

Each takes `(spec, view)` and gives `[L]`, one number per layer, computed for all layers at once. Layers are never
pooled before a product: pooled, too much load on an expert in one layer would cancel too little in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.routing import mechanisms as options
from rmoe.routing.contract import RouterContext, Routing, count_by_layer
from rmoe.routing.router import BaseRouter, SharedRouter
from rmoe.routing.spec import RouterSpec


class LossView(NamedTuple):
    """What a balance loss may look at: the decisions of all `L` layers for this micro-batch.

    Attributes:
        logits, probs: `[L, T, C]`, see `Routing`.
        experts: `[L, T, K]`.
        context: mask and shape of the micro-batch.
        counts: `[L, E]`, the assignments whose shares the loss uses (`BalanceSpec.scope`).
        num_experts: `E`.
        top_k: `k`.
        experts_matrices: `[C, f]` of each layer, or None.
    """

    logits: Tensor
    probs: Tensor
    experts: Tensor
    context: RouterContext
    counts: Tensor
    num_experts: int
    top_k: int
    experts_matrices: list[Tensor | None]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of `[L, T, *]`: `[L, *]`."""
    if mask is None:
        return values.mean(1)
    return torch.einsum("lt...,t->l...", values, mask.to(values.dtype)) / mask.sum().clamp(min=1)


def load_balance(spec: options.LoadBalance, view: LossView) -> Tensor:
    """`E sum_n f_n P_n`: `f_n` share of assignments to expert n, `P_n` its mean probability (Switch, Eq. 4 to 6).

    With `count="assignments"` the `f_n` sum to 1 and perfect balance gives 1; with "tokens" `f_n` is the share of
    tokens, k times as large (OLMoE's and transformers' codes differ by this factor). The gradient flows through `P`.
    """
    experts = view.num_experts
    mean = masked_mean(view.probs[..., :experts], view.context.mask)
    counts = view.counts.to(mean.dtype)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    scale = experts * (view.top_k if spec.count == "tokens" else 1)
    return scale * (share * mean).sum(-1)


def z_loss(spec: options.ZLoss, view: LossView) -> Tensor:
    """`mean_t logsumexp(logits_t)^2` (ST-MoE, Eq. 5)."""
    return masked_mean(torch.logsumexp(view.logits, -1).square(), view.context.mask)


def sequence_balance(spec: options.SequenceBalance, view: LossView) -> Tensor:
    """`mean_b E sum_n f_bn P_bn` within each sequence b (DeepSeek-V3, Eq. 17 to 20); `f_b` sums to 1."""
    experts, batch, length = view.num_experts, view.context.batch, view.context.length
    mask, layers = view.context.mask, view.probs.shape[0]
    real = torch.ones_like(view.probs[0, :, 0]) if mask is None else mask.to(view.probs.dtype)
    # One bin per layer, sequence and expert, and one for empty slots.
    owner = torch.arange(layers * batch, device=real.device).view(layers, batch, 1)
    chosen = view.experts.view(layers, batch, -1) + owner * (experts + 1)
    weights = real[None, :, None].expand_as(view.experts).reshape(-1)
    load = torch.zeros(layers * batch * (experts + 1), dtype=real.dtype, device=real.device).scatter_add(
        0, chosen.reshape(-1), weights
    )
    load = load.view(layers, batch, experts + 1)[..., :experts]
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    real = real.view(batch, length)
    probs = view.probs[..., :experts].view(layers, batch, length, experts)
    mean = torch.einsum("lbsn,bs->lbn", probs, real) / real.sum(-1)[:, None].clamp(min=1)
    per_sequence = experts * (share * mean).sum(-1)  # [L, B]
    present = (real.sum(-1) > 0).to(mean.dtype)
    return (per_sequence * present).sum(-1) / present.sum().clamp(min=1)


def mutual_information(spec: options.MutualInformation, view: LossView) -> Tensor:
    """`-(H(mean_t p_t) - mean_t H(p_t))` in nats (ModuleFormer): lower when experts are used evenly and surely."""
    probs, mask = view.probs, view.context.mask
    marginal = torch.special.entr(masked_mean(probs, mask)).sum(-1)
    return masked_mean(torch.special.entr(probs).sum(-1), mask) - marginal


def similarity_preserving(spec: options.SimilarityPreserving, view: LossView) -> Tensor:
    """`|| R R^T - I ||_1 / E^2`, `R` `[E, f]` the scorer's expert vectors (2506.14038); over `E^2` is our scaling."""
    if any(matrix is None for matrix in view.experts_matrices):
        raise ValueError("similarity_preserving needs a scorer with an experts matrix")
    matrix = torch.stack(view.experts_matrices)  # type: ignore[arg-type]
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    gram = matrix @ matrix.mT
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().mean((-2, -1))


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
    counts: Tensor | None = None,
) -> Tensor:
    """The weighted sum of all balance losses and the mechanisms' own penalties, each the mean over layers.

    Args:
        routers: the routing layers, in order.
        routings: their decisions.
        shared: what they share.
        context: mask and shape of the micro-batch.
        coefficient: weight of losses whose own weight is None (the model's `router_aux_loss_coef`).
        earlier: `[L, E]` of this rank's earlier micro-batches, see `counts_in_scope`.
        counts: `[L, E]`, this micro-batch's, where they are known already.

    Returns:
        Scalar, at least float32; zero when the router has no balance loss.
    """
    spec, num_experts = routers[0].spec, routers[0].num_experts
    total = routings[0].probs.new_zeros(())
    for routing in routings:
        if routing.penalty is not None:
            total = total + routing.penalty
    if routers[0].losses:
        with torch.no_grad():
            own = counts if counts is not None else count_by_layer(routings, num_experts, context.mask)
            counts = counts_in_scope(spec, own, earlier, routers[0].training)
        view = LossView(
            logits=torch.stack([routing.logits for routing in routings]),
            probs=torch.stack([routing.probs for routing in routings]),
            experts=torch.stack([routing.experts for routing in routings]),
            context=context,
            counts=counts,
            num_experts=num_experts,
            top_k=routers[0].geometry.top_k,
            experts_matrices=[router.experts_matrix(shared) for router in routers],
        )
        for loss, function in routers[0].losses:
            weight = loss.weight
            total = total + (coefficient if weight is None else weight) * function(loss, view).sum()
    return total / len(routings)
