"""Initial values as small functions of (tensor, generator).

A module says how each of its own parameters starts in `initializers()`; who fills them decides the generator:
transformers' `_init_weights` the default one, `rmoe.model.initialize` one keyed by (seed, parameter name).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

Initializer = Callable[[Tensor, Generator | None], object]


def normal(std: float) -> Initializer:
    return partial(_normal, std=std)


def uniform(bound: float) -> Initializer:
    return partial(_uniform, bound=bound)


def constant(value: float) -> Initializer:
    return partial(_constant, value=value)


def orthogonal(gain: float) -> Initializer:
    return partial(_orthogonal, gain=gain)


# Modules keep their initializers, and a model must pickle: no lambdas.


def _normal(tensor: Tensor, generator: Generator | None, std: float) -> None:
    nn.init.normal_(tensor, 0.0, std, generator=generator)


def _uniform(tensor: Tensor, generator: Generator | None, bound: float) -> None:
    nn.init.uniform_(tensor, -bound, bound, generator=generator)


def _constant(tensor: Tensor, generator: Generator | None, value: float) -> None:
    nn.init.constant_(tensor, value)


def _orthogonal(tensor: Tensor, generator: Generator | None, gain: float) -> None:
    nn.init.orthogonal_(tensor, gain, generator=generator)


class Initialized(nn.Module):
    """A module that knows how its own parameters (not its children's) start."""

    def initializers(self) -> dict[str, Initializer]:
        """Parameter name -> how it starts."""
        return {}


class PassedModule(nn.Module):
    """A module of the model's that layers get as an argument.

    accelerate's hooks move a layer's arguments to the layer's device by their `to`, modules too. One that is offloaded
    has no data to move: its own hooks bring it when it is used.
    """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        if any(parameter.is_meta for parameter in self.parameters()):
            return self
        return super().to(*args, **kwargs)


class ProjectionFP32(Initialized):
    """A linear map computed in at least float32, whatever the input and the weight are stored in.

    Router scores decide between experts, and bfloat16 has 8 bits to tell two of them apart.

    Args:
        in_features, out_features, bias: as of `torch.nn.Linear`.
        weight_init: how the weight starts; a bias starts at zero.
        frozen: hold weight and bias as buffers, which are saved but which no optimizer, no adapter and no reload
            (transformers loads every parameter as trainable) can set in motion.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_init: Initializer,
        bias: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        values = {
            "weight": torch.empty(out_features, in_features),
            "bias": torch.empty(out_features) if bias else None,
        }
        for name, value in values.items():
            if frozen:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.weight_init = weight_init

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": self.weight_init, "bias": constant(0.0)}

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply what it computes by `factor`."""
        self.weight.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        """`[*, in]` of any floating dtype -> `[*, out]`, float32 or float64."""
        return linear_fp32(x, self.weight, self.bias)


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` in float32, or in float64 when either side is."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
