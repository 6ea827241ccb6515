"""Initial values as small functions of (tensor, generator), and who draws them.

A module says how each of its own parameters starts in `initializers()`; who fills them decides the generator:
transformers' `_init_weights` the default one, `fill` one keyed by (seed, parameter name). transformers draws from one
generator in module order, so one projector more changes every weight after it, and two routers would not start from
the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
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


def rms_norm_as_input(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm(x)` in the dtype of `x`, which is at least float32 in a router, whatever the weight is stored in."""
    return nn.functional.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` in float32, or in float64 when either side is."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def keyed_generator(seed: int, name: str) -> Generator:
    """A CPU generator whose stream depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def initializers_of(module: nn.Module, std: float) -> dict[str, Initializer]:
    """How a module's own parameters start: as it says, else by its kind (weights normal, biases 0, norms 1)."""
    if isinstance(module, Initialized) or hasattr(module, "initializers"):
        return module.initializers()  # type: ignore[operator,union-attr]
    if isinstance(module, nn.Linear | nn.Embedding):
        return {"weight": normal(std), "bias": constant(0.0)}
    if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
        return {"weight": constant(1.0), "bias": constant(0.0)}
    return {}


def own_tensors(module: nn.Module, rules: dict[str, Initializer]) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters, and frozen ones held as buffers, that have a rule."""
    for name in rules:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            yield name, tensor


def fill(root: nn.Module, seed: int, std: float, scope: str = "") -> None:
    """Fill every parameter below `root` from a generator keyed by (seed, scope, parameter name).

    Parameters of the same name and shape are then equal for every pair of routers. Values are drawn in float32 on the
    CPU and copied, so the device does not matter.

    Args:
        std: of the normal start of modules that do not say how they start.
        scope: put before each name, for several models under one seed.

    Raises:
        ValueError: a parameter that no rule covers.
    """
    for prefix, module in root.named_modules():
        rules = initializers_of(module, std)
        missing = dict(module.named_parameters(recurse=False)).keys() - rules.keys()
        if missing:
            raise ValueError(f"no initial value is defined for {sorted(missing)} of {prefix}")
        draw(module, rules, seed, f"{scope}{prefix}." if prefix else scope)


@torch.no_grad()
def draw(module: nn.Module, rules: dict[str, Initializer], seed: int, path: str) -> None:
    """Fill a module's own parameters, but for those on the meta device, each by (seed, path and name)."""
    for name, tensor in own_tensors(module, rules):
        if not tensor.is_meta:
            value = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            rules[name](value, keyed_generator(seed, path + name))
            tensor.copy_(value)
