"""Stage 2, scorers of released models: a linear one behind a norm (Gemma 4), and product keys (Doge)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rmoe.routing.initial import Initializer, ProjectionFP32, constant, normal
from rmoe.routing.noise import Noise
from rmoe.routing.options import Geometry
from rmoe.routing.scorer import Scorer
from rmoe.validation import Positive


class NormedLinear(Scorer):
    """`G (norm(f) * c / sqrt(f's width))`, `norm` RMSNorm without a scale and `c` a learned one, 1 at the start.

    Source: transformers' `Gemma4TextRouter`.
    """

    class Config(Scorer.Config):
        kind = "normed_linear"
        equation = "s = G (norm(f) * c / sqrt(d))"

        norm_eps: Positive = 1e-6

    options: Config

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        self.scale = nn.Parameter(torch.empty(features))
        self.linear = ProjectionFP32(features, geometry.num_experts, normal(geometry.initializer_range))

    def initializers(self) -> dict[str, Initializer]:
        return {"scale": constant(1.0)}

    def last(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.linear

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        x = features.to(torch.promote_types(features.dtype, torch.float32))
        x = x * torch.pow(x.pow(2).mean(-1, keepdim=True) + self.options.norm_eps, -0.5)
        return self.linear(x * self.scale * self.features**-0.5)


class ProductKeys(Scorer):
    """`s_(i, j) = f . u_i + f . v_j`: `a + b` keys score `E = a b` experts, `a` the largest divisor up to `sqrt(E)`.

    Source: transformers' `DogeCDMoE`, where `a = b`; product keys are of Lample et al. 2019, 1907.05242.
    """

    class Config(Scorer.Config):
        kind = "product_keys"
        equation = "s_ij = u_i f + v_j f"

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        experts = geometry.num_experts
        self.rows = next(n for n in range(math.isqrt(experts), 0, -1) if experts % n == 0)
        keys = self.rows + experts // self.rows
        self.keys = ProjectionFP32(features, keys, normal(geometry.initializer_range))

    def _pairs(self, scores: Tensor, dim: int) -> Tensor:
        """The sums of a first and a second key's part, along `dim`, which holds both."""
        first, second = scores.tensor_split((self.rows,), dim)
        return (first.unsqueeze(dim + 1) + second.unsqueeze(dim)).flatten(dim, dim + 1)

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self._pairs(self.keys.weight, 0)

    def scaled_by(self, shared: nn.Module | None) -> ProjectionFP32:
        return self.keys

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        return self._pairs(self.keys(features), 1)
