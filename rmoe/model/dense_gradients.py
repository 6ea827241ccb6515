"""Dense gradients: experts that a token did not choose teach the router too, whatever the router is.

The mixture whose gradient the router gets is `sum_n w_n E_n(x)` over all experts. A chosen expert's `w` is the gate's
weight. Another's is its probability in the gate's units, `w_n = p_n r` with `r = sum w / sum p` over the chosen, held
constant: 1 without renormalisation, `1 / sum p` with it, as DenseMixer's code has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.routing.contract import RouterStats, Routing, dispatched_experts
from rmoe.routing.step_state import StepState


def unchosen_weights(routing: Routing, num_experts: int) -> Tensor:
    """`[T, E]`: each expert's weight in the dense mixture, 0 where it was chosen. Its gradient is the router's."""
    probs, slots = routing.probs[:, :num_experts], dispatched_experts(routing, num_experts)
    chosen = (
        torch.zeros_like(probs[:, :1]).expand(-1, num_experts + 1).scatter(1, slots, 1.0)[:, :num_experts]
    )
    mass = (probs * chosen).sum(-1, keepdim=True)
    unit = routing.weights.sum(-1, keepdim=True) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return probs * unit.detach() * (1 - chosen)


class _OfAllExperts(torch.autograd.Function):
    """Zero going forward; going back, the gradient of each expert's weight, `<E_n(x), dy>`: a straight-through.

    Experts are computed on the way back, one after the other, so nothing of `[T, E, d]` is ever made.
    """

    @staticmethod
    def forward(weights: Tensor, x: Tensor, experts: Any) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: Tensor) -> None:
        weights, x, ctx.experts = inputs
        ctx.save_for_backward(x)
        ctx.dtype = weights.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        each = [(ctx.experts.one(n, x) * grad).sum(-1) for n in range(ctx.experts.num_experts)]
        return torch.stack(each, -1).to(ctx.dtype), None, None


def densemixer(experts: Any, x: Tensor, routing: Routing) -> Tensor:
    """`[T, d]` zeros whose gradient is that of the experts that were not chosen. Source: DenseMixer's public code.

    Experts get the sparse forward pass's gradients and no others.

    Args:
        experts: the layer's, with `one(n, x)`.
        x: `[T, d]`.
        routing: the decision.

    Raises:
        RequestError: the experts are wrapped, as PEFT's `target_parameters` does: one alone cannot be computed.
    """
    if not hasattr(experts, "one"):
        allowed = f"null with experts in a {type(experts).__name__}, which computes them all or none"
        raise RequestError("dense_gradients", "densemixer", allowed)
    return _OfAllExperts.apply(unchosen_weights(routing, experts.num_experts), x.detach(), experts)


class DefaultOutputs(StepState):
    """Default MoE (2504.12463): an expert that was not chosen gives the moving average of its outputs, `[E, d]`.

    `y = sum_chosen w_n E_n(x) + sum_others w_n m_n`, in evaluation too; `m` moves once per optimizer step, over the
    step's real tokens, and starts at zero. The decay is ours: the source's was not seen.
    """

    mean: Tensor

    def __init__(self, num_experts: int, hidden_size: int, decay: float = 0.9) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.decay = num_experts, hidden_size, decay
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"mean": torch.zeros(self.num_experts, self.hidden_size, dtype=torch.float32)}

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """What the experts that were not chosen add, `[T, d]` in the dtype of `x`."""
        weights = unchosen_weights(routing, self.num_experts)
        return (weights @ self.mean.to(weights.dtype)).to(x.dtype)

    @torch.no_grad()
    def observe(self, outputs: Tensor, slots: Tensor, mask: Tensor | None) -> Tensor:
        """Sums for `update`, `[E * (d + 1)]`: of outputs `[T, K, d]` by expert, and how many they are."""
        if mask is not None:
            slots = slots.masked_fill(~mask[:, None], self.num_experts)
        rows = torch.cat((outputs, torch.ones_like(outputs[..., :1])), -1).flatten(0, 1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sums = rows.new_zeros(self.num_experts + 1, rows.shape[-1]).index_add(0, slots.flatten(), rows)
        return sums[: self.num_experts].flatten()

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        if stats.observed is None:  # sums of an evaluation
            return
        size = self.num_experts * (self.hidden_size + 1)
        sums = stats.observed[layer, -size:].view(self.num_experts, -1)
        count = sums[:, -1:]
        latest = (sums[:, :-1] / count.clamp(min=1)).to(self.mean)
        self.mean.copy_(torch.where(count > 0, self.mean.lerp(latest, 1 - self.decay), self.mean))
