"""Stage 2: `logits = scorer(features, shared, noise)`, Eq. 6: `[T, f]` -> `[T, C]`, raw, at least float32.

`experts_matrix` is what a scorer compares tokens with, `[C, f']`, for the weight-norm analysis and the
similarity-preserving loss; None where there is no such thing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing import mechanisms as options
from rmoe.routing.initial import (
    Initialized,
    Initializer,
    ProjectionFP32,
    constant,
    linear_fp32,
    normal,
    orthogonal,
)
from rmoe.routing.noise import Noise
from rmoe.routing.spec import Geometry


class Scorer(Initialized):
    """Base of all scorers.

    Args:
        geometry: the model's sizes.
        features: width of what it reads.
    """

    def __init__(self, geometry: Geometry, features: int) -> None:
        super().__init__()
        self.num_experts, self.features = geometry.num_experts, features

    def experts_matrix(self, shared: nn.Module | None) -> Tensor | None:
        return None

    def scaled_by(self, shared: nn.Module | None) -> nn.Module | None:
        """The module whose `rescale(factor)` multiplies the logits by a factor; None where nothing does."""
        return None

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        raise NotImplementedError


def _linear(spec: options.Linear, geometry: Geometry, features: int) -> ProjectionFP32:
    std = spec.init_std
    if std is None:
        std = geometry.initializer_range
    elif std == "inverse_sqrt":
        std = features**-0.5
    return ProjectionFP32(features, geometry.num_experts, normal(float(std)), spec.bias, spec.frozen)


class Linear(Scorer):
    """`G h` (Eq. 1, 6). With `shared_layers != 1` the weights are the model's: PathMoE, Omni-router."""

    def __init__(self, spec: options.Linear, geometry: Geometry, features: int) -> None:
        super().__init__(geometry, features)
        self.group = None if spec.shared_layers == 1 else group_of(spec, geometry.layer_index)
        self.linear = _linear(spec, geometry, features) if self.group is None else None

    def _weights(self, shared: nn.Module | None) -> ProjectionFP32:
        if self.linear is not None:
            return self.linear
        return shared.groups[self.group]  # type: ignore[union-attr,index,return-value]

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self._weights(shared).weight

    def scaled_by(self, shared: nn.Module | None) -> ProjectionFP32:
        return self._weights(shared)

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        return self._weights(shared)(features)


def group_of(spec: options.Linear, layer_index: int) -> int:
    """Which of the model's shared scorers a layer uses."""
    return 0 if spec.shared_layers == 0 else layer_index // spec.shared_layers


class SharedLinear(nn.Module):
    """The scorers that several layers use, owned by the model."""

    def __init__(self, spec: options.Linear, geometry: Geometry, features: int) -> None:
        super().__init__()
        count = group_of(spec, geometry.num_layers - 1) + 1
        self.groups = nn.ModuleList(_linear(spec, geometry, features) for _ in range(count))


class MLP(Scorer):
    """`W_2 GELU(W_1 x + b_1)`, dropout between (SMoE-MLP, Table 4; ModuleFormer)."""

    def __init__(self, spec: options.MLP, geometry: Geometry, features: int) -> None:
        super().__init__(geometry, features)
        start = normal(geometry.initializer_range)
        self.up = ProjectionFP32(features, spec.width, start, bias=True)
        self.out = ProjectionFP32(spec.width, geometry.num_experts, start)
        self.dropout = spec.dropout

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self.out.weight

    def scaled_by(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.out

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        hidden = F.gelu(self.up(features))
        if self.dropout and noise is not None:
            hidden = hidden * (noise.uniform(hidden) >= self.dropout) / (1 - self.dropout)
        return self.out(hidden)


MOST_LOG_INVERSE_TEMPERATURE = math.log(100)


class Cosine(Scorer):
    """`cos(W x, e_n) / t`, `t` learned (XMoE 2204.09179; CosineMoE after 2405.14131 and Tutel).

    Deviation from torchscale's XMoE in the "paper" form: the token side is normalised as the paper's equation
    says; `normalize_tokens=False` is torchscale's code, where that line is commented out.
    """

    def __init__(self, spec: options.Cosine, geometry: Geometry, features: int) -> None:
        super().__init__(geometry, features)
        self.spec = spec
        width = spec.width or features
        start = normal(geometry.initializer_range)
        self.projection = ProjectionFP32(features, width, start, spec.projection_bias) if spec.width else None
        self.embeddings = nn.Parameter(torch.empty(geometry.num_experts, width))
        self.log_inverse_temperature = nn.Parameter(torch.empty(()))

    def initializers(self) -> dict[str, Initializer]:
        embeddings = orthogonal(0.32) if self.spec.embedding_init == "orthogonal" else normal(0.01)
        return {
            "embeddings": embeddings,
            "log_inverse_temperature": constant(-math.log(self.spec.temperature)),
        }

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self.embeddings

    def scaled_by(self, shared: nn.Module | None) -> Cosine:
        return self

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the logits by `factor`, through the temperature.

        Raises:
            ValueError: the temperature would fall below 0.01, where `forward` holds it.
        """
        moved = float(self.log_inverse_temperature) + math.log(factor)
        if moved > MOST_LOG_INVERSE_TEMPERATURE:
            raise ValueError(
                f"the cosine's temperature would be {math.exp(-moved):.2g}, below its least, 0.01"
            )
        self.log_inverse_temperature.fill_(moved)

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        x = features if self.projection is None else self.projection(features)
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, embeddings = x.to(dtype), F.normalize(self.embeddings.to(dtype), dim=-1)
        if self.spec.normalize_tokens:
            x = F.normalize(x, dim=-1)
        scale = self.log_inverse_temperature.to(dtype).clamp(max=MOST_LOG_INVERSE_TEMPERATURE).exp()
        return scale * linear_fp32(x, embeddings)


class HalfCosine(Scorer):
    """`x . c_n / |c_n|`; centroids start orthogonal with gain 0.1."""

    def __init__(self, spec: options.HalfCosine, geometry: Geometry, features: int) -> None:
        super().__init__(geometry, features)
        self.centroids = nn.Parameter(torch.empty(geometry.num_experts, features))

    def initializers(self) -> dict[str, Initializer]:
        return {"centroids": orthogonal(0.1)}

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self.centroids

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        dtype = torch.promote_types(self.centroids.dtype, torch.float32)
        return linear_fp32(features, F.normalize(self.centroids.to(dtype), dim=-1))


class Hypernetwork(Scorer):
    """HyperRouter (2312.07035): `[G | b] = W_2 ReLU(W_1 e + b_1) + b_2`, `e` trained, the rest frozen at random.

    The RMoE paper's tables call it HyperMoE. The output layer has `E (d + 1)` rows; its last column is the bias.
    """

    def __init__(self, spec: options.Hypernetwork, geometry: Geometry, features: int) -> None:
        super().__init__(geometry, features)
        rows = geometry.num_experts * (features + 1)
        self.embedding = nn.Parameter(torch.empty(1, features))
        fan_in, width = features**-0.5, spec.width**-0.5
        self.up = ProjectionFP32(features, spec.width, normal(fan_in), bias=True, frozen=True)
        self.out = ProjectionFP32(spec.width, rows, normal(width * fan_in), bias=True, frozen=True)

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
    """RMSNorm, Linear, GELU, Linear, GELU, Linear (ZAYA1, 2605.05365; transformers' `ZayaRouterMLP`)."""

    def __init__(self, spec: options.EdaHead, geometry: Geometry, features: int) -> None:
        super().__init__(geometry, features)
        start = normal(geometry.initializer_range)
        self.norm = nn.RMSNorm(features, eps=spec.norm_eps)
        self.fc1 = ProjectionFP32(features, features, start, bias=True)
        self.fc2 = ProjectionFP32(features, features, start, bias=True)
        self.out = ProjectionFP32(features, geometry.num_experts + spec.skip_class, start)

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self.out.weight

    def scaled_by(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.out

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        weight = self.norm.weight.to(features.dtype)
        x = F.rms_norm(features, self.norm.normalized_shape, weight, self.norm.eps)
        return self.out(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
