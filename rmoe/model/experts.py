"""How the experts are computed: `sorted_mm`, our own path, and `auto`, which chooses between it and transformers'.

Both are registered with transformers, so `experts_implementation="sorted_mm"` works for any of its MoE models whose
experts are plain (no bias, no norm, weights `[E, out, in]`).

`sorted_mm` visits the experts that were hit one after the other. What an expert needs between its two matrix
products stays in the processor's cache: rows are gathered, activated, weighted and added to the result before the
next expert begins. Nothing of `[T * K, d]` is ever made; only the inner products `[T * K, 2I]` wait for the
backward pass. The weight `g` is applied to the activation, and its gradient is `<a, W_down^T dy>`, so that the
experts' outputs need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from rmoe.compat import has_default_gate, plain_forward
from rmoe.errors import RequestError
from rmoe.model.norm import has_values

aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "swish": (F.silu, aten.silu_backward),
    "relu": (F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    "gelu": (F.gelu, aten.gelu_backward),
}
"""What `sorted_mm` can differentiate: name -> the function, and its gradient from (gradient, input)."""


def experts_in_turn(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[tuple[int, slice]]]:
    """Put assignments into the experts' order.

    Args:
        index: `[T, K]` int64; `E` or more is an empty slot.

    Returns:
        `slots` `[T * K]`, assignments sorted by expert, stably; `tokens` `[T * K]`, whose they are; and for each
        expert that was hit its number and its part of the two. Empty slots come last and are in no part.
    """
    flat = index.reshape(-1)
    slots = torch.sort(flat, stable=True).indices
    parts, start = [], 0
    for expert, count in enumerate(torch.bincount(flat, minlength=num_experts).tolist()[:num_experts]):
        if count:
            parts.append((expert, slice(start, start + count)))
            start += count
    return slots, slots // index.shape[1], parts


def _activate(inner: Tensor, width: int, act: str) -> Tensor:
    """`act(gate) * up` of `[n, 2I]`, or `act(up)` of `[n, I]`: a new tensor."""
    function = ACTIVATIONS[act][0]
    if inner.shape[1] == width:
        return function(inner)
    return function(inner[:, :width]).mul_(inner[:, width:])


@torch.library.custom_op("rmoe::sorted_experts", mutates_args=())
def sorted_experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    """`sum_n g_n W_down act(W_up x)`.

    Args:
        x: `[T, d]`. index: `[T, K]` int64, `E` or more in an empty slot. weights: `[T, K]`, in the dtype of `x`.
        up: `[E, 2I, d]` (gate, then up) or `[E, I, d]`. down: `[E, d, I]`. act: a name in `ACTIVATIONS`.

    Returns:
        `[T, d]`, and the inner products `[T * K, 2I]` in the experts' order, for the backward pass.
    """
    width = down.shape[2]
    slots, tokens, parts = experts_in_turn(index, up.shape[0])
    weights = weights.reshape(-1)
    inner = x.new_empty(slots.shape[0], up.shape[1])
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, part in parts:
        rows = torch.mm(x.index_select(0, tokens[part]), up[expert].t(), out=inner[part])
        hidden = _activate(rows, width, act).mul_(weights.index_select(0, slots[part])[:, None])
        out.index_add_(0, tokens[part], torch.mm(hidden, down[expert].t()).to(out.dtype))
    inner[parts[-1][1].stop if parts else 0 :] = (
        0  # of empty slots: nobody reads it, but an output is defined
    )
    return out.to(x.dtype), inner


@sorted_experts.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(index.numel(), up.shape[1])


@torch.library.custom_op("rmoe::sorted_experts_backward", mutates_args=())
def sorted_experts_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    inner: Tensor,
    act: str,
    for_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up and down from that of the output; without `for_experts` the last two are empty."""
    gradient, width = ACTIVATIONS[act][1], down.shape[2]
    gated = up.shape[1] != width
    slots, tokens, parts = experts_in_turn(index, up.shape[0])
    flat = weights.reshape(-1)
    grad_x = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    grad_weights = torch.zeros_like(flat)
    grad_up, grad_down = (torch.empty_like(w) if for_experts else w.new_empty(0) for w in (up, down))
    for expert, part in parts:
        token, slot, rows = tokens[part], slots[part], inner[part]
        weight = flat.index_select(0, slot)[:, None]
        outer = grad.index_select(0, token)  # [n, d]
        inward = torch.mm(outer, down[expert])  # [n, I], of the unweighted activation
        gate = rows[:, :width]  # all there is where experts have no gate
        activated = ACTIVATIONS[act][0](gate)
        if gated:
            linear, grad_rows = rows[:, width:], torch.empty_like(rows)
            grad_linear = torch.mul(activated, weight, out=grad_rows[:, width:])
            activated.mul_(linear)
        grad_weights.index_copy_(0, slot, (inward * activated).sum(-1))
        if gated:
            grad_linear.mul_(inward)
            grad_rows[:, :width] = gradient(inward.mul_(weight).mul_(linear), gate)
        else:
            grad_rows = gradient(inward.mul_(weight), rows)
        if for_experts:
            torch.mm(outer.t(), activated.mul_(weight), out=grad_down[expert])
            torch.mm(grad_rows.t(), x.index_select(0, token), out=grad_up[expert])
        grad_x.index_add_(0, token, torch.mm(grad_rows, up[expert]).to(grad_x.dtype))
    if for_experts and len(parts) < up.shape[0]:
        idle = sorted(set(range(up.shape[0])) - {expert for expert, _ in parts})
        grad_up[idle], grad_down[idle] = 0, 0
    return grad_x.to(x.dtype), grad_weights.view_as(weights), grad_up, grad_down


@sorted_experts_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    inner: Tensor,
    act: str,
    for_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ups, downs = (torch.empty_like(w) if for_experts else w.new_empty(0) for w in (up, down))
    return torch.empty_like(x), torch.empty_like(weights), ups, downs


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # `inner` would get one of zeros


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    for_experts = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grads = torch.ops.rmoe.sorted_experts_backward(grad.contiguous(), *saved, ctx.act, for_experts)
    grad_x, grad_weights, grad_up, grad_down = grads
    return (
        grad_x,
        None,
        grad_weights,
        grad_up if for_experts else None,
        grad_down if for_experts else None,
        None,
    )


sorted_experts.register_autograd(_backward, setup_context=_keep)


def one_token_experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, act: str
) -> Tensor:
    """The same for `[1, d]`, without gradients: reads the weights of the chosen experts and no others."""
    row, width = x[0], down.shape[2]
    out = torch.zeros_like(row, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, weight in zip(index[0].tolist(), weights[0].tolist(), strict=True):
        if expert >= up.shape[0]:
            continue
        inner = torch.mv(up[expert], row)
        hidden = ACTIVATIONS[act][0](inner[:width])
        if inner.shape[0] != width:
            hidden.mul_(inner[width:])
        if out.dtype == x.dtype:
            out.addmv_(down[expert], hidden, alpha=weight)
        else:
            out.add_(torch.mv(down[expert], hidden), alpha=weight)
    return out.to(x.dtype)[None]


def sorted_mm_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`sorted_mm`, as transformers calls an experts implementation.

    Raises:
        RequestError: experts that are not plain, or an activation it has no gradient for.
    """
    if not supports_sorted_mm(self):
        given = f"another for {type(self).__name__} with {_activation(self)}"
        raise RequestError("experts_implementation", "sorted_mm", given)
    return _sorted_mm(self, hidden_states, top_k_index, top_k_weights)


def _sorted_mm(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    act = self.config.hidden_act
    up, down = self.gate_up_proj if self.has_gate else self.up_proj, self.down_proj
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        hidden_states, up, down = hidden_states.to(low), up.to(low), down.to(low)
    weights = top_k_weights.to(hidden_states.dtype)
    if hidden_states.shape[0] == 1 and not torch.is_grad_enabled() and has_values(hidden_states):
        return one_token_experts(hidden_states, top_k_index, weights, up, down, act)
    return sorted_experts(hidden_states, top_k_index, weights, up, down, act)[0]


def supports_sorted_mm(experts: Any) -> bool:
    """Whether `sorted_mm` computes what these experts mean."""
    special = experts.has_bias or experts.is_transposed or getattr(experts, "has_post_expert_norm", False)
    default_gate = has_default_gate(experts) and experts.is_concatenated
    return not special and (default_gate or not experts.has_gate) and _activation(experts) in ACTIVATIONS


def _activation(experts: Any) -> str | None:
    """Its name; None where the family calls it something else, as Gemma 4 and Nemotron-H do."""
    return getattr(experts.config, "hidden_act", None)


FEW_ROWS = 64
"""On the CPU, without gradients: below so many tokens an expert `grouped_mm` is faster than `sorted_mm`."""


def choose_experts(
    device: str,
    dtype: torch.dtype,
    tokens: int,
    rows: float,
    hidden: int,
    width: int,
    *,
    grad: bool,
    compiled: bool,
) -> str:
    """The experts path that `auto` takes, a pure function: a run must not depend on how busy the machine was.

    Measured on the CPU in float32 (benchmarks/results, cases "block" and "decode"): for a single token `sorted_mm`,
    which then reads the chosen experts' weights and no others, and inside a compiled region `batched_mm`, which does
    so too and is fused; without gradients and below `FEW_ROWS` tokens an expert `grouped_mm` takes 0.4 to 0.9 of
    `sorted_mm`'s time; at training's sizes `sorted_mm` is the fastest. On a GPU nothing was measured: there it is
    transformers' own rule, batched_mm for single tokens, grouped_mm for bfloat16 with rows of whole 16 bytes, and
    `sorted_mm`, which waits for the device once a layer, for the rest.

    Args:
        device: type of the device. dtype: of the stream. tokens: `T`. rows: of an expert on average, `T k / E`.
        hidden: `d`. width: of an expert. grad: whether a backward pass may follow. compiled: by `torch.compile`.
    """
    if dtype == torch.float64:
        return "sorted_mm"  # grouped_mm knows no doubles
    if device == "cpu":
        if grad or rows >= FEW_ROWS:
            return "sorted_mm"
        if tokens == 1:
            return "batched_mm" if compiled else "sorted_mm"
        return "grouped_mm" if in_whole_16_bytes(hidden, width, dtype) else "sorted_mm"
    if tokens == 1:
        return "batched_mm"
    return (
        "grouped_mm" if dtype == torch.bfloat16 and in_whole_16_bytes(hidden, width, dtype) else "sorted_mm"
    )


def in_whole_16_bytes(hidden: int, width: int, dtype: torch.dtype) -> bool:
    """Whether rows of both widths are: torch's grouped product refuses others."""
    return hidden * dtype.itemsize % 16 == 0 and width * dtype.itemsize % 16 == 0


ExpertsForward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class _Cast:
    """Experts as they are, but for the dtype of their weights."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self.experts, self.down_proj = experts, experts.down_proj.to(dtype)
        if experts.has_gate:
            self.gate_up_proj = experts.gate_up_proj.to(dtype)
        else:
            self.up_proj = experts.up_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def heeds_autocast(function: ExpertsForward) -> ExpertsForward:
    """An experts implementation whose products are in autocast's dtype, where torch's kernel takes the sizes.

    The grouped product is not on autocast's list, and computes in whatever dtype the weights have.
    """

    @wraps(function)
    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        kind = hidden_states.device.type
        sizes = hidden_states.shape[-1], self.down_proj.shape[-1]
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if low is None or not in_whole_16_bytes(*sizes, low):
            return function(self, hidden_states, top_k_index, top_k_weights)
        return function(_Cast(self, low), hidden_states.to(low), top_k_index, top_k_weights.to(low))

    return forward


def auto_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`auto`: what `choose_experts` says for these sizes; the plain loop where `sorted_mm` cannot."""
    kind, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    tokens, hidden = hidden_states.shape
    rows = top_k_index.numel() / self.num_experts
    choice = choose_experts(
        kind,
        dtype,
        tokens,
        rows,
        hidden,
        self.down_proj.shape[-1],
        grad=torch.is_grad_enabled(),
        compiled=torch.compiler.is_compiling(),
    )
    if choice == "sorted_mm":
        if supports_sorted_mm(self):
            return _sorted_mm(self, hidden_states, top_k_index, top_k_weights)
        choice = "eager"
    function = EXPERTS.get_interface(choice, plain_forward(self))
    return function(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("sorted_mm", sorted_mm_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)

EXPERTS = ExpertsInterface()
"""All implementations as this package's models run them."""
EXPERTS["grouped_mm"] = heeds_autocast(grouped_mm_experts_forward)
EXPERTS["batched_mm"] = heeds_autocast(batched_mm_experts_forward)
