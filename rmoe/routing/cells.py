"""One step of a recurrence over depth, Eq. 5: `state = cell(x, state)`, `x` and each part of the state `[T, p]`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.contract import State
from rmoe.routing.gru_cpu import GRUOnCPU
from rmoe.routing.initial import Initialized, Initializer, constant, linear_fp32, uniform


class Cell(Initialized):
    """Base of all cells."""

    def initial(self, x: Tensor) -> State:
        """`h_0 = 0`."""
        return (torch.zeros_like(x),)


class GatedCell(Cell):
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
        wide = [part.to(dtype) for part in parts]
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return (GRUOnCPU.apply(*wide)[0],)
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


class Decay(Cell):
    """`r_l = x'_l + a_l * r_{l-1}`, a vector `a` per layer, ones at the start; none in the first (ZAYA1's EDA)."""

    def __init__(self, width: int, layer_index: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width)) if layer_index > 0 else None

    def initializers(self) -> dict[str, Initializer]:
        return {"scale": constant(1.0)}

    def forward(self, x: Tensor, state: State) -> State:
        return (x if self.scale is None else torch.addcmul(x, self.scale.to(x.dtype), state[0]),)


class GatedDecay(Cell):
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


class Identity(Cell):
    """`h = x'`: the low-rank linear router, what the bottleneck alone does."""

    def forward(self, x: Tensor, state: State) -> State:
        return (x,)

    def initial(self, x: Tensor) -> State:
        return ()


SHARED_CELLS: dict[str, type[GatedCell]] = {"gru": GRU, "rnn": RNN, "lstm": LSTM}
LAYER_CELLS: dict[str, type[Decay | GatedDecay]] = {"decay": Decay, "gated_decay": GatedDecay}
