"""RMSNorm. On the CPU torch has no fused one, and its composite form walks over the stream a dozen times."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RMSNormCPU(torch.autograd.Function):
    """`w x / rms(x)` and `1 / rms(x)`, float32 or float64; keeps `x` and one number per row."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * scale).mul_(weight), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, unused: Tensor | None) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        rows, grad_rows, scale = x.reshape(-1, width), grad.reshape(-1, width), scale.reshape(-1, 1)
        product = grad_rows * rows
        grad_weight = torch.mv(product.t(), scale[:, 0])
        along = torch.mv(product, weight)[:, None].mul_(scale.pow(3)).div_(-width)
        grad_x = torch.mul(grad_rows, weight, out=product).mul_(scale).addcmul_(rows, along)
        return grad_x.view_as(x), grad_weight, None


def has_values(x: Tensor) -> bool:
    """Whether a number may be read out of it: a trace would keep it as a constant, a `FakeTensor` has none."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and not torch.jit.is_tracing()


class RMSNorm(nn.Module):
    """`w x / sqrt(mean(x^2) + eps)`, arithmetic in at least float32, `[*, d]` -> `[*, d]` in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.dtype in (torch.float32, torch.float64) and x.dtype == self.weight.dtype
        if x.device.type == "cpu" and wide and not torch.compiler.is_compiling():
            if x.numel() == x.shape[-1] and not torch.is_grad_enabled() and has_values(x):
                return self._one_row(x)
            out: Tensor = _RMSNormCPU.apply(x, self.weight, self.variance_epsilon)[0]
            return out
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return self.weight * F.rms_norm(x, self.weight.shape, None, self.variance_epsilon)

    def _one_row(self, x: Tensor) -> Tensor:
        """The same where calls cost more than passes over the numbers: the fewest calls."""
        row = x.reshape(-1)
        square = torch.dot(row, row).item() / row.shape[0] + self.variance_epsilon
        return (x * self.weight).mul_(square**-0.5 if square else math.inf)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"
