"""How experts are kept equally busy: losses, a bias on the selection, and a limit on what an expert takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rmoe.routing.contract import RouterContext, RouterStats, Routing, count_by_layer
from rmoe.routing.losses import Loss, LossView
from rmoe.routing.options import Geometry, Options
from rmoe.routing.step_state import StepState
from rmoe.validation import NotNegative, Positive, require

if TYPE_CHECKING:
    from rmoe.routing.router import BaseRouter


class BalanceSpec(Options):
    """How experts are kept equally busy: losses, a bias on the selection, and what happens beyond capacity.

    Attributes:
        losses: added to the language-model loss.
        scope: whose tokens the assignment shares of the losses count: this micro-batch's, or those of all
            ranks and of the earlier micro-batches of this optimizer step (arXiv:2501.11873).
        bias_update_rate: step of the aux-loss-free bias on the selection scores (arXiv:2408.15664); 0 is off.
        bias_centred: subtract the mean from each bias update, as torchtitan does.
        capacity_factor: each expert takes at most `ceil(factor * T * k / E)` tokens of a batch, in token
            order, the rest is dropped; None is dropless. The `T` tokens of a call compete, outside training too: what
            a token keeps depends on later tokens and other sequences, and decoding with a cache drops fewer.
    """

    stage = "balance"
    kind = "balance"

    losses: tuple[Loss, ...] = ()
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    bias_update_rate: NotNegative = 0.0
    bias_centred: bool = False
    capacity_factor: Positive | None = None

    @property
    def moves(self) -> bool:
        return self.bias_update_rate > 0

    def check(self) -> None:
        kinds = [loss.kind for loss in self.losses]
        require(len(kinds) == len(set(kinds)), "balance.losses", kinds, "each kind at most once")

    def described(self) -> str:
        parts = [loss.kind for loss in self.losses]
        parts += ["global batch"] if self.scope == "global_batch" else []
        parts += [f"bias {self.bias_update_rate:g}"] if self.bias_update_rate else []
        parts += [f"capacity {self.capacity_factor:g}"] if self.capacity_factor is not None else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"losses": [loss.to_dict() for loss in self.losses]}

    @classmethod
    def from_dict(cls, data: object) -> BalanceSpec:
        if isinstance(data, dict) and isinstance(data.get("losses"), list | tuple):
            data = {**data, "losses": [Loss.from_dict(loss) for loss in data["losses"]]}
        return super().from_dict(data)


class SelectionBias(StepState):
    """Aux-loss-free balancing (2408.15664): `b += rate * sign(mean load - load)`, float32.

    A skip class, the last of `E + 1`, starts at `skip_bias` and is not moved: it bears no load. Nor are experts that
    compute nothing, behind the E; theirs starts at 0.
    """

    bias: Tensor

    def __init__(
        self,
        spec: BalanceSpec,
        geometry: Geometry,
        skip_class: bool,
        skip_bias: float = -1.0,
        zero_experts: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.num_experts, self.zero_experts = spec, geometry.num_experts, zero_experts
        self.skip_class, self.skip_bias = skip_class, skip_bias
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        bias = torch.zeros(self.num_experts + self.zero_experts + self.skip_class, dtype=torch.float32)
        if self.skip_class:
            bias[-1] = self.skip_bias
        return {"bias": bias}

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        # Integers: mean > load exactly when the sum > E * load, without rounding.
        load = stats.counts[layer]
        direction = torch.sign(load.sum() - self.num_experts * load).to(self.bias)
        if self.spec.bias_centred:
            direction = direction - direction.mean()
        self.bias[: self.num_experts] += self.spec.bias_update_rate * direction


def limit_capacity(
    routing: Routing, factor: float, experts: int, k: int | Tensor, mask: Tensor | None
) -> Routing:
    """Drop each expert's assignments beyond `ceil(factor * T * k / E)`, first come first served in token order.

    `T` counts real tokens. The position of an assignment in its expert's queue comes from a stable sort: no
    `[T * K, E]` one-hot tensor, no host synchronisation.

    Args:
        factor: `BalanceSpec.capacity_factor`.
        experts: `E`.
        k: of this layer and step, which may be below the slots `K`.
    """
    flat = routing.experts if mask is None else routing.experts.masked_fill(~mask[:, None], experts)
    flat = flat.reshape(-1)
    ordered, order = torch.sort(flat, stable=True)
    first = torch.searchsorted(ordered, ordered)  # where each one's queue begins
    position = torch.empty_like(flat).scatter(
        0, order, torch.arange(flat.numel(), device=flat.device) - first
    )
    tokens = routing.experts.shape[0] if mask is None else mask.sum()
    asked = k.double() if isinstance(k, Tensor) else k
    exact = torch.as_tensor(tokens, dtype=torch.float64) * (factor * asked / experts)
    capacity = torch.ceil(exact - 1e-9)  # 1.1 * 100 / 10 is 11, and a little more in floating point
    dropped = (position >= capacity.to(flat.device)).view_as(routing.experts) & (routing.experts < experts)
    if mask is not None:
        dropped = dropped & mask[:, None]
    return routing._replace(weights=routing.weights.masked_fill(dropped, 0.0), dropped=dropped)


def _top_k(routers: Sequence[BaseRouter], like: Tensor) -> int | Tensor:
    """k of the layers at this step: one number, or `[L]` where layers or steps differ."""
    every = [router.current_k for router in routers]
    if all(isinstance(k, int) and k == every[0] for k in every):
        return every[0]
    return torch.stack([torch.as_tensor(k, device=like.device) for k in every])


def counts_in_scope(spec: BalanceSpec, own: Tensor, earlier: Tensor | None, training: bool) -> Tensor:
    """The assignment counts the losses use, `[L, E]`, without gradient.

    Args:
        spec: its `scope` decides.
        own: this micro-batch's.
        earlier: this rank's of the earlier micro-batches of this optimizer step; or None.
        training: ranks add up their counts in training only, since an evaluation may run on one of them.
    """
    if spec.scope == "micro_batch":
        return own
    counts = own if earlier is None else own + earlier
    return summed_over_ranks(counts) if training else counts


def summed_over_ranks(own: Tensor) -> Tensor:
    """The sum of every rank's tensor, the same on all; a process alone has its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    total = own.clone()
    torch.distributed.all_reduce(total)
    return total


def balance_loss(
    routers: Sequence[BaseRouter],
    routings: Sequence[Routing],
    context: RouterContext,
    coefficient: float,
    earlier: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The weighted sum of all balance losses and the mechanisms' own penalties, each the mean over layers.

    Args:
        routers: the routing layers, in order.
        routings: their decisions.
        context: mask and shape of the micro-batch.
        coefficient: weight of losses whose own weight is None (the model's `router_aux_loss_coef`).
        earlier: `[L, E]` of this rank's earlier micro-batches, see `counts_in_scope`.
        counts: `[L, E]`, this micro-batch's, where they are known already.

    Returns:
        Scalar, at least float32; zero when the router has no balance loss.
    """
    spec, num_experts = routers[0].spec, routers[0].num_experts
    losses = spec.balance.losses
    total = routings[0].probs.new_zeros(())
    for routing in routings:
        if routing.penalty is not None:
            total = total + routing.penalty
    if losses:
        with torch.no_grad():
            own = counts if counts is not None else count_by_layer(routings, num_experts, context.mask)
            counts = counts_in_scope(spec.balance, own, earlier, routers[0].training)
        experts = torch.stack([routing.experts for routing in routings])
        classes = [routing.classes for routing in routings if routing.classes is not None]
        view = LossView(
            logits=torch.stack([routing.logits for routing in routings]),
            probs=torch.stack([routing.probs for routing in routings]),
            experts=experts,
            classes=torch.stack(classes) if classes else experts,
            context=context,
            counts=counts,
            num_experts=num_experts,
            top_k=_top_k(routers, counts),
            experts_matrices=[routing.experts_matrix for routing in routings],
        )
        for loss in losses:
            weight = coefficient if loss.weight is None else loss.weight
            total = total + weight * loss(view).sum()
    return total / len(routings)
