"""One step of the GRU on the CPU with its backward pass by hand; its equation is in `cells.GRU`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + b`, all three with a leading dimension of stacked models or all without."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


class GRUOnCPU(torch.autograd.Function):
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
        return GRUOnCPU.apply(*stacked), (0, 0, 0)

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
