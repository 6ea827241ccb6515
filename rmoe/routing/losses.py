"""Balance losses: pure functions of the layers' `Routing`. Their mean over layers is added to the training loss.

A loss is its own options: called with a `LossView` it gives `[L]`, one number per layer, computed for all layers at
once. Layers are never pooled before a product: pooled, too much load on an expert in one layer would cancel too
little in another.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rmoe.routing.contract import RouterContext, gate_entropy
from rmoe.routing.options import Options
from rmoe.validation import NotNegative, require


class LossView(NamedTuple):
    """What a balance loss may look at: the decisions of all `L` layers for this micro-batch.

    Attributes:
        logits, probs: `[L, T, C]`, see `Routing`.
        experts: `[L, T, K]`.
        classes: `[L, T, K]`, the choice among all classes, see `Routing`.
        context: mask and shape of the micro-batch.
        counts: `[L, E]`, the assignments whose shares the loss uses (`BalanceSpec.scope`).
        num_experts: `E`.
        top_k: `k`; `[L]` where it differs from layer to layer, or from step to step.
        experts_matrices: `[C, f]` of each layer, where a loss `reads_experts_matrix`; None where a router has none.
    """

    logits: Tensor
    probs: Tensor
    experts: Tensor
    classes: Tensor
    context: RouterContext
    counts: Tensor
    num_experts: int
    top_k: int | Tensor
    experts_matrices: list[Tensor | None]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens of `[L, T, *]`: `[L, *]`."""
    if mask is None:
        return values.mean(1)
    return torch.einsum("lt...,t->l...", values, mask.to(values.dtype)) / mask.sum().clamp(min=1)


def shares_chosen(chosen: Tensor, classes: int, real: Tensor) -> Tensor:
    """How the choices of each group of tokens divide among the classes, without gradient.

    One scatter into 1-D bins: deterministic on a GPU, and `torch.vmap` has a rule for it, unlike for `bincount`.

    Args:
        chosen: `[*, T, K]` int64, `classes` in an empty slot.
        classes: `C`.
        real: broadcast against `[*, T]`: 1 for a token, 0 for padding.

    Returns:
        `[*, C]`, of `real`'s dtype; each row sums to one, or is zero where nothing was chosen.
    """
    first = chosen[..., :1, :1]
    owner = torch.arange(first.numel(), device=chosen.device).view_as(first)
    index = (chosen + owner * (classes + 1)).reshape(-1)
    weights = real[..., None].expand_as(chosen).reshape(-1)
    bins = torch.zeros(first.numel() * (classes + 1), dtype=real.dtype, device=chosen.device)
    load = bins.scatter_add(0, index, weights).view(*chosen.shape[:-2], classes + 1)[..., :classes]
    return load / load.sum(-1, keepdim=True).clamp(min=1)


def real_tokens(view: LossView) -> Tensor:
    """`[T]`, 1 for a token and 0 for padding, of the probabilities' dtype."""
    mask = view.context.mask
    return torch.ones_like(view.probs[0, :, 0]) if mask is None else mask.to(view.probs.dtype)


class Loss(Options):
    """Base of all balance losses.

    `weight` multiplies it in the training loss; None stands for the model's `router_aux_loss_coef`.
    """

    stage = "loss"
    reads_experts_matrix = False  # of `LossView`; the routers give theirs only where a loss does

    weight: NotNegative | None = None

    def name_of(self, option: str) -> str:
        return f"loss.{self.kind}.{option}"

    def __call__(self, view: LossView) -> Tensor:
        """`[L]`, one value per layer."""
        raise NotImplementedError


class LoadBalance(Loss):
    """`E sum_n f_n P_n`: `f_n` share of assignments to expert n, `P_n` its mean probability (Switch, Eq. 4 to 6).

    With `count="assignments"` the `f_n` sum to 1 and perfect balance gives 1; with "tokens" `f_n` is the share of
    tokens, k times as large (OLMoE's and transformers' codes differ by this factor). The gradient flows through `P`.
    Beside classes that compute nothing it is least when none of the E is asked: they have `HeterogeneousBalance`.
    """

    kind = "load_balance"

    count: Literal["assignments", "tokens"] = "assignments"

    def __call__(self, view: LossView) -> Tensor:
        experts = view.num_experts
        mean = masked_mean(view.probs[..., :experts], view.context.mask)
        counts = view.counts.to(mean.dtype)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        scale = experts * (view.top_k if self.count == "tokens" else 1)
        return scale * (share * mean).sum(-1)


class ZLoss(Loss):
    """`mean_t logsumexp(logits_t)^2` (ST-MoE, Eq. 5)."""

    kind = "z"

    weight: NotNegative | None = 1e-3

    def __call__(self, view: LossView) -> Tensor:
        return masked_mean(torch.logsumexp(view.logits, -1).square(), view.context.mask)


class SequenceBalance(Loss):
    """`mean_b E sum_n f_bn P_bn` within each sequence b (DeepSeek-V3, Eq. 17 to 20); `f_b` sums to 1.

    `f_b` is of what was chosen, with the selection bias; Eq. 18 takes the k largest scores without it.
    """

    kind = "sequence_balance"

    weight: NotNegative | None = 1e-4

    def __call__(self, view: LossView) -> Tensor:
        experts, batch, length = view.num_experts, view.context.batch, view.context.length
        layers, real = view.probs.shape[0], real_tokens(view).view(batch, length)
        share = shares_chosen(view.experts.view(layers, batch, length, -1), experts, real)
        probs = view.probs[..., :experts].view(layers, batch, length, experts)
        mean = torch.einsum("lbsn,bs->lbn", probs, real) / real.sum(-1)[:, None].clamp(min=1)
        per_sequence = experts * (share * mean).sum(-1)  # [L, B]
        present = (real.sum(-1) > 0).to(mean.dtype)
        return (per_sequence * present).sum(-1) / present.sum().clamp(min=1)


class MutualInformation(Loss):
    """`-(H(mean_t p_t) - mean_t H(p_t))` in nats (ModuleFormer): lower when experts are used evenly and surely."""

    kind = "mutual_information"

    weight: NotNegative | None = 1e-3

    def __call__(self, view: LossView) -> Tensor:
        probs, mask = view.probs, view.context.mask
        return masked_mean(gate_entropy(probs), mask) - gate_entropy(masked_mean(probs, mask))


class GateEntropy(Loss):
    """`mean_t H(p_t)` in nats: keeps a top-p gate from asking many experts (2403.07652)."""

    kind = "gate_entropy"

    weight: NotNegative | None = 1e-4

    def __call__(self, view: LossView) -> Tensor:
        return masked_mean(gate_entropy(view.probs), view.context.mask)


class SimilarityPreserving(Loss):
    """`|| R R^T - I ||_1 / E^2`, `R` `[E, f]` the scorer's expert vectors (2506.14038); over `E^2` is our scaling."""

    kind = "similarity_preserving"
    reads_experts_matrix = True

    weight: NotNegative | None = 1e-2

    def __call__(self, view: LossView) -> Tensor:
        matrix = _experts_matrices(view, self.kind)
        gram = matrix @ matrix.mT
        return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().mean((-2, -1))


class DiverseSimple(Loss):
    """`|| U U^T - I ||_F + mean_n || R_n ||_2`, `R` `[E, f]` the scorer's expert vectors, `U` their unit vectors.

    Keeps experts apart and their vectors small (DynMoE, 2405.14297, as its code has it).
    """

    kind = "diverse_simple"
    reads_experts_matrix = True

    def __call__(self, view: LossView) -> Tensor:
        matrix = _experts_matrices(view, self.kind)
        units = torch.nn.functional.normalize(matrix, dim=-1)
        gram = units @ units.mT
        apart = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return torch.linalg.vector_norm(apart, dim=(-2, -1)) + torch.linalg.vector_norm(matrix, dim=-1).mean(
            -1
        )


def _experts_matrices(view: LossView, kind: str) -> Tensor:
    """`[L, E, f]`, at least float32."""
    compared = all(matrix is not None for matrix in view.experts_matrices)
    require(compared, "balance.losses", kind, "losses without it, with a router that has no expert vectors")
    matrix = torch.stack([matrix.to(view.probs.device) for matrix in view.experts_matrices])  # type: ignore[union-attr]
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
