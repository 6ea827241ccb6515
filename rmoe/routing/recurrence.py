"""Stage 1: `features, state = recurrence(hidden, state, shared)`, Eq. 4 and 5.

The recurrence runs over depth. A token's state meets no other token's, so neither the sequence nor the key-value
cache has any part in it. What all layers share (the cell, in S-proj the projector) belongs to the model and comes
in as `shared`; what is a layer's own belongs to the layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rmoe.routing.contract import State
from rmoe.routing.initial import (
    Initialized,
    Initializer,
    PassedModule,
    ProjectionFP32,
    constant,
    linear_fp32,
    normal,
    uniform,
)
from rmoe.routing.mechanisms import NoRecurrence as NoRecurrenceSpec
from rmoe.routing.mechanisms import Recurrence as RecurrenceOptions
from rmoe.routing.spec import Geometry


class GatedCell(Initialized):
    """Weights of a recurrent cell, named and laid out as torch's: `gates` blocks of `[p, p]` on each side."""

    gates: int

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight_ih = nn.Parameter(torch.empty(self.gates * width, width))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * width, width))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * width))
        self.bias_hh = nn.Parameter(torch.empty(self.gates * width))

    def initializers(self) -> dict[str, Initializer]:
        """Torch's own: U(-1/sqrt(p), 1/sqrt(p)), "standard GRU init" in the paper."""
        start = uniform(1 / math.sqrt(self.width))
        return dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), start)

    def products(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """All gates' input and hidden terms, one matrix product each: `[T, p]` -> `[T, gates * p]` twice."""
        return linear_fp32(x, self.weight_ih, self.bias_ih), linear_fp32(h, self.weight_hh, self.bias_hh)

    def initial(self, x: Tensor) -> State:
        """`h_0 = 0`."""
        return (torch.zeros_like(x),)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + b`, all three with a leading dimension of stacked models or all without."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


class _GRUOnCPU(torch.autograd.Function):
    """One step of the cell in few passes over memory: torch fuses it for CUDA only, and autograd's takes twice as many.

    Keeps `x`, `h`, `n`, and in one tensor `s`, `z` and `U_n h`. Under `torch.func.vmap`, where several models are
    trained stacked, everything has their dimension in front: inputs `[S, T, p]`, weights `[S, 3p, p]`.
    """

    @staticmethod
    def forward(
        x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        both = 2 * h.shape[-1]
        inputs, hiddens = _affine(x, w_ih, b_ih), _affine(h, w_hh, b_hh)
        s, z = hiddens[..., :both].add_(inputs[..., :both]).sigmoid_().chunk(2, -1)
        n = torch.addcmul(inputs[..., both:], s, hiddens[..., both:]).tanh_()
        return torch.lerp(n, h, z), hiddens, n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, hiddens, n = output
        ctx.mark_non_differentiable(hiddens, n)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], hiddens, n)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *args: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        stacked = (
            part.expand(info.batch_size, *part.shape) if dim is None else part.movedim(dim, 0)
            for part, dim in zip(args, in_dims, strict=True)
        )
        return _GRUOnCPU.apply(*stacked), (0, 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, w_ih, w_hh, hiddens, n = ctx.saved_tensors
        p = h.shape[-1]
        s, z, n_h = hiddens.split(p, -1)
        # By columns: what reaches U_n h, s, z, and W_n x. The first three belong to the hidden product, in the order
        # (n, s, z), and the last three to the input product, in the weights' own (s, z, n): nothing is held twice.
        grads = h.new_empty(*h.shape[:-1], 4 * p)
        grad_n_h, grad_s, grad_z, grad_n = grads.split(p, -1)
        of_hidden, of_input, of_gates = grads[..., : 3 * p], grads[..., p:], grads[..., p : 3 * p]
        grad_h = grad * z
        room = torch.sub(h, n)
        torch.mul(grad, room, out=grad_z)
        torch.sub(grad, grad_h, out=room)
        torch.ops.aten.tanh_backward.grad_input(room, n, grad_input=grad_n)
        torch.mul(grad_n, n_h, out=grad_s)
        torch.ops.aten.sigmoid_backward.grad_input(of_gates, hiddens[..., : 2 * p], grad_input=of_gates)
        torch.mul(grad_n, s, out=grad_n_h)
        wanted = ctx.needs_input_grad
        bias = grads.new_ones(grads.shape[-2]) @ grads if wanted[4] or wanted[5] else None
        add_product = torch.Tensor.addmm_ if w_hh.dim() == 2 else torch.Tensor.baddbmm_
        return (
            torch.matmul(of_input, w_ih, out=room) if wanted[0] else None,
            add_product(grad_h, of_hidden, torch.roll(w_hh, p, -2)) if wanted[1] else None,
            (x.mT @ of_input).mT if wanted[2] else None,
            torch.roll((h.mT @ of_hidden).mT, -p, -2) if wanted[3] else None,
            bias[..., p:] if bias is not None else None,
            torch.roll(bias[..., : 3 * p], -p, -1) if bias is not None else None,
        )


class GRU(GatedCell):
    """Eq. 2 and 3 with two matrices and biases for the candidate, as in the public code and `torch.nn.GRUCell`.

    `s = sig(W_s x + U_s h)`, `z = sig(W_z x + U_z h)`, `n = tanh(W_n x + s * (U_n h))`, `h' = (1-z) * n + z * h`.
    """

    gates = 3

    def forward(self, x: Tensor, state: State) -> State:
        (h,) = state
        if torch.compiler.is_compiling():  # it fuses what is written out
            inputs, hiddens = self.products(x, h)
            s_x, z_x, n_x = inputs.chunk(3, -1)
            s_h, z_h, n_h = hiddens.chunk(3, -1)
            s, z = torch.sigmoid(s_x + s_h), torch.sigmoid(z_x + z_h)
            n = torch.tanh(n_x + s * n_h)
            return (n + z * (h - n),)
        dtype = torch.promote_types(x.dtype, self.weight_ih.dtype)
        parts = (x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        wide = tuple(part.to(dtype) for part in parts)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return (_GRUOnCPU.apply(*wide)[0],)
        return (torch.gru_cell(*wide),)


class RNN(GatedCell):
    """`h' = tanh(W x + U h)` (Table 6)."""

    gates = 1

    def forward(self, x: Tensor, state: State) -> State:
        inputs, hiddens = self.products(x, state[0])
        return (torch.tanh(inputs + hiddens),)


class LSTM(GatedCell):
    """`torch.nn.LSTMCell`'s equations (Table 6). The state is `(h, c)`; the scorer reads `h`."""

    gates = 4

    def forward(self, x: Tensor, state: State) -> State:
        h, c = state
        inputs, hiddens = self.products(x, h)
        i, f, g, o = (inputs + hiddens).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def initial(self, x: Tensor) -> State:
        return torch.zeros_like(x), torch.zeros_like(x)


class Decay(Initialized):
    """`r_l = x'_l + a_l * r_{l-1}`, a vector `a` per layer, ones at the start; none in the first (ZAYA1's EDA)."""

    def __init__(self, width: int, layer_index: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width)) if layer_index > 0 else None

    def initializers(self) -> dict[str, Initializer]:
        return {"scale": constant(1.0)}

    def forward(self, x: Tensor, state: State) -> State:
        return (x if self.scale is None else torch.addcmul(x, self.scale.to(x.dtype), state[0]),)

    def initial(self, x: Tensor) -> State:
        return (torch.zeros_like(x),)


class GatedDecay(Initialized):
    """`h_l = x'_l + z * h_{l-1}`, `z = sig(W [norm(x'_l); norm(h_{l-1})] + b)`: a linear state that can forget.

    `norm` is RMSNorm without a weight. `W` starts at zero and `b` at 3, so every layer starts by keeping
    `sig(3) = 0.953` of the state: nearly `Decay`. `W` and `b` are a layer's own; the first layer has no state and
    neither.

    Source: ours.
    """

    def __init__(self, width: int, layer_index: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, 2 * width)) if layer_index > 0 else None
        self.bias = nn.Parameter(torch.empty(width)) if layer_index > 0 else None

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": constant(0.0), "bias": constant(3.0)}

    def forward(self, x: Tensor, state: State) -> State:
        if self.weight is None:
            return (x,)
        (h,) = state
        seen = torch.cat([F.rms_norm(part, (self.width,), eps=1e-5) for part in (x, h)], -1)  # [T, 2p]
        return (torch.addcmul(x, torch.sigmoid(linear_fp32(seen, self.weight, self.bias)), h),)

    def initial(self, x: Tensor) -> State:
        return (torch.zeros_like(x),)


class Identity(Initialized):
    """`h = x'`: the low-rank linear router, what the bottleneck alone does."""

    def forward(self, x: Tensor, state: State) -> State:
        return (x,)

    def initial(self, x: Tensor) -> State:
        return ()


SHARED_CELLS: dict[str, type[GatedCell]] = {"gru": GRU, "rnn": RNN, "lstm": LSTM}
LAYER_CELLS: dict[str, type[Decay | GatedDecay]] = {"decay": Decay, "gated_decay": GatedDecay}


def _projector(spec: RecurrenceOptions, geometry: Geometry) -> ProjectionFP32:
    return ProjectionFP32(
        geometry.hidden_size, spec.width, normal(geometry.initializer_range), spec.projector_bias
    )


class SharedRecurrence(PassedModule):
    """The part of the recurrence that belongs to the model: the cell, and in S-proj the projector."""

    def __init__(self, spec: RecurrenceOptions, geometry: Geometry) -> None:
        super().__init__()
        self.cell = SHARED_CELLS[spec.cell](spec.width) if spec.cell_is_shared else None
        self.projector = _projector(spec, geometry) if spec.projector == "shared" else None


class Recurrence(nn.Module):
    """Eq. 4 and 5 for one layer.

    Shapes: hidden `[T, d]`, any floating dtype -> features `[T, p]` (`[T, d + p]` with `concat_hidden`), at least
    float32, and the state, each part `[T, p]`.
    """

    def __init__(self, spec: RecurrenceOptions, geometry: Geometry) -> None:
        super().__init__()
        self.spec = spec
        self.projector = _projector(spec, geometry) if spec.projector == "layer" else None
        self.cell: nn.Module | None = None
        if spec.cell in LAYER_CELLS:
            self.cell = LAYER_CELLS[spec.cell](spec.width, geometry.layer_index)
        elif spec.cell == "identity":
            self.cell = Identity()
        self.norm = nn.RMSNorm(spec.width, eps=1e-5) if spec.normalize else None
        cut = spec.truncate_every is not None and geometry.layer_index % spec.truncate_every == 0
        self.detached = cut or spec.carry == "detached"

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        projector: Any = self.projector if self.projector is not None else _of(shared).projector
        cell: Any = self.cell if self.cell is not None else _of(shared).cell
        x = projector(hidden)  # [T, p]
        if not state or self.spec.carry == "zero":
            state = cell.initial(x)
        elif self.detached:
            state = tuple(part.detach() for part in state)
        state = cell(x, state)
        features = state[0]
        if self.norm is not None:
            features = F.rms_norm(
                features, self.norm.normalized_shape, self.norm.weight.to(features.dtype), self.norm.eps
            )
        if self.spec.concat_hidden:
            features = torch.cat((hidden.to(features.dtype), features), -1)
        return features, () if self.spec.carry == "zero" else state


def _of(shared: nn.Module | None) -> nn.Module:
    if shared is None:
        raise ValueError("this recurrence shares its cell or projector: pass the model's `router_shared`")
    return shared


class NoRecurrence(nn.Module):
    """Features are the hidden states; the state stays empty."""

    def __init__(self, spec: NoRecurrenceSpec, geometry: Geometry) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        return hidden, state
