"""Stage 2: `logits = scorer(features, shared, noise)`, Eq. 6: `[T, f]` -> `[T, C]`, raw, at least float32.

`experts_matrix` is what a scorer compares tokens with, `[C, f']`, for the weight-norm analysis and the
similarity-preserving loss; None where there is no such thing. Scorers that compare angles are in `cosine.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.initial import (
    Initialized,
    Initializer,
    ProjectionFP32,
    linear_fp32,
    normal,
    rms_norm_as_input,
)
from rmoe.routing.noise import Noise
from rmoe.routing.options import Geometry, Mechanism, Options
from rmoe.validation import NotNegative, NotNegativeInt, Positive, PositiveInt, Share


class Scorer(Initialized, Mechanism):
    """Base of all scorers: features `[T, f]` -> raw logits `[T, C]`. Built from (options, geometry, features).

    Args:
        geometry: the model's sizes.
        features: width `f` of what it reads.
    """

    class Config(Options):
        stage = "scorer"

        @property
        def skip_class(self) -> bool:
            """Whether it gives one more logit than there are experts, for a class that skips them."""
            return False

        def build_shared(self, geometry: Geometry, features: int) -> nn.Module | None:
            """What it shares with the other layers, built once for the model; None is nothing."""
            return None

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__()
        self.options = options
        self.num_experts, self.features = geometry.num_experts, features

    def last(self, shared: nn.Module | None) -> ProjectionFP32 | None:
        """The linear map that gives the logits; None where none does."""
        return None

    def experts_matrix(self, shared: nn.Module | None) -> Tensor | None:
        last = self.last(shared)
        return None if last is None else _matrix(last)

    def scaled_by(self, shared: nn.Module | None) -> nn.Module | None:
        """The module whose `rescale(factor)` multiplies the logits by a factor; None where nothing does."""
        return self.last(shared)

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        raise NotImplementedError


def _matrix(linear: nn.Module) -> Tensor:
    """The matrix of a linear map; where an adapter wraps it, what it makes of unit vectors."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if isinstance(linear, ProjectionFP32):
        return weight
    units = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return (linear(units) - linear(torch.zeros_like(units[:1]))).mT


class Linear(Scorer):
    """`G h` (Eq. 1, 6). With `shared_layers != 1` the weights are the model's: PathMoE, Omni-router."""

    class Config(Scorer.Config):
        """Attributes:
        bias: fastmoe's router has one, transformers' have none.
        init_std: of the normal initialisation; None is the model's own; "inverse_sqrt" is `features^-1/2`,
            which a state bounded by 1 needs.
        frozen: kept at its random initialisation (RandomSMoE).
        shared_layers: how many consecutive layers use the same weights: 1, each its own; 0, all of them.
        """

        kind = "linear"

        bias: bool = False
        init_std: Positive | Literal["inverse_sqrt"] | None = None
        frozen: bool = False
        shared_layers: NotNegativeInt = 1

        @property
        def equation(self) -> str:
            return "s = G f + b" if self.bias else "s = G f"

        @property
        def carries(self) -> str:
            if self.shared_layers == 1:
                return ""
            return f"nothing; weights shared by {self.shared_layers or 'all'} layers"

        def build_shared(self, geometry: Geometry, features: int) -> nn.Module | None:
            return None if self.shared_layers == 1 else SharedLinear(self, geometry, features)

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        self.group = None if options.shared_layers == 1 else _group_of(options, geometry.layer_index)
        self.linear = _linear(options, geometry, features) if self.group is None else None

    def last(self, shared: nn.Module | None) -> ProjectionFP32:
        if self.linear is not None:
            return self.linear
        return shared.groups[self.group]  # type: ignore[union-attr,index,return-value]

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        return self.last(shared)(features)


def _linear(options: Linear.Config, geometry: Geometry, features: int) -> ProjectionFP32:
    std = options.init_std
    if std is None:
        std = geometry.initializer_range
    elif std == "inverse_sqrt":
        std = features**-0.5
    return ProjectionFP32(features, geometry.num_experts, normal(float(std)), options.bias, options.frozen)


def _group_of(options: Linear.Config, layer_index: int) -> int:
    """Which of the model's shared scorers a layer uses."""
    return 0 if options.shared_layers == 0 else layer_index // options.shared_layers


class SharedLinear(nn.Module):
    """The scorers that several layers use, owned by the model."""

    def __init__(self, options: Linear.Config, geometry: Geometry, features: int) -> None:
        super().__init__()
        count = _group_of(options, geometry.num_layers - 1) + 1
        self.groups = nn.ModuleList(_linear(options, geometry, features) for _ in range(count))


class MLP(Scorer):
    """`W_2 GELU(W_1 x + b_1)`, dropout between (SMoE-MLP, Table 4; ModuleFormer)."""

    class Config(Scorer.Config):
        kind = "mlp"
        equation = "s = G GELU(W f + b)"

        width: PositiveInt = 256
        dropout: Share = 0.0

        @property
        def uses_noise(self) -> bool:
            return self.dropout > 0

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        start = normal(geometry.initializer_range)
        self.up = ProjectionFP32(features, options.width, start, bias=True)
        self.out = ProjectionFP32(options.width, geometry.num_experts, start)
        self.dropout = options.dropout

    def last(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.out

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        hidden = F.gelu(self.up(features))
        if self.dropout and noise is not None:
            hidden = hidden * (noise.uniform(hidden) >= self.dropout) / (1 - self.dropout)
        return self.out(hidden)


class Hypernetwork(Scorer):
    """HyperRouter (2312.07035): `[G | b] = W_2 ReLU(W_1 e + b_1) + b_2`, `e` trained, the rest frozen at random.

    The RMoE paper's tables call it HyperMoE. The output layer has `E (d + 1)` rows; its last column is the bias.
    """

    class Config(Scorer.Config):
        kind = "hypernetwork"
        equation = "[G, b] = M(e); s = G f + b"

        width: PositiveInt = 256

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        rows = geometry.num_experts * (features + 1)
        self.embedding = nn.Parameter(torch.empty(1, features))
        fan_in, width = features**-0.5, options.width**-0.5
        self.up = ProjectionFP32(features, options.width, normal(fan_in), bias=True, frozen=True)
        self.out = ProjectionFP32(options.width, rows, normal(width * fan_in), bias=True, frozen=True)

    def initializers(self) -> dict[str, Initializer]:
        return {"embedding": normal(1.0)}

    def _generated(self) -> tuple[Tensor, Tensor]:
        table = self.out(F.relu(self.up(self.embedding))).view(self.num_experts, self.features + 1)
        return table[:, :-1], table[:, -1]

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self._generated()[0]

    def scaled_by(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.out

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        weight, bias = self._generated()
        return linear_fp32(features, weight, bias)


class EdaHead(Scorer):
    """RMSNorm, Linear, GELU, Linear, GELU, Linear to `E + 1` classes, the last one "skip".

    Source: ZAYA1, 2605.05365; transformers' `ZayaRouterMLP`.
    """

    class Config(Scorer.Config):
        kind = "eda_head"
        equation = "s = MLP(norm(f))"

        skip_class: bool = True
        norm_eps: NotNegative = 1e-5

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        start = normal(geometry.initializer_range)
        self.norm = nn.RMSNorm(features, eps=options.norm_eps)
        self.fc1 = ProjectionFP32(features, features, start, bias=True)
        self.fc2 = ProjectionFP32(features, features, start, bias=True)
        self.out = ProjectionFP32(features, geometry.num_experts + options.skip_class, start)

    def last(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.out

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        x = rms_norm_as_input(features, self.norm)
        return self.out(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
