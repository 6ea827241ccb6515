"""Stage 2, scorers that compare angles: XMoE, CosineMoE, half-cosine."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.initial import Initializer, ProjectionFP32, constant, linear_fp32, normal, orthogonal
from rmoe.routing.noise import Noise
from rmoe.routing.options import Geometry
from rmoe.routing.scorer import Scorer
from rmoe.validation import Positive, PositiveInt, require

MOST_LOG_INVERSE_TEMPERATURE = math.log(100)


class Cosine(Scorer):
    """`cos(W x, e_n) / t`, `t` learned (XMoE 2204.09179; CosineMoE after 2405.14131 and Tutel).

    Deviation from torchscale's XMoE in the "paper" form: the token side is normalised as the paper's equation
    says; `normalize_tokens=False` is torchscale's code, where that line is commented out. That code applies no
    temperature either: there `t` is ours.
    """

    class Config(Scorer.Config):
        """Attributes:
        width: project to so many dimensions first; None compares the features themselves.
        projection_bias: of that projection.
        normalize_tokens: "paper" normalises both sides; torchscale's code only the embeddings (False).
        embedding_init: "orthogonal" (gain 0.32, XMoE) or "normal" (std 0.01, Tutel).
        temperature: initial divisor of the cosine, learned as its logarithm and kept above 0.01.
        """

        kind = "cosine"

        width: PositiveInt | None = None
        projection_bias: bool = False
        normalize_tokens: bool = True
        embedding_init: Literal["orthogonal", "normal"] = "orthogonal"
        temperature: Positive = 0.5

        def check(self) -> None:
            warm = -math.log(self.temperature) <= MOST_LOG_INVERSE_TEMPERATURE
            require(warm, "scorer.temperature", self.temperature, "0.01 or more, where it is held")

        @property
        def equation(self) -> str:
            read = "W f" if self.width else "f"
            return f"s = cos({read}, e) / t" if self.normalize_tokens else f"s = {read} . unit(e) / t"

    options: Config

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        width = options.width or features
        start = normal(geometry.initializer_range)
        self.projection = (
            ProjectionFP32(features, width, start, options.projection_bias) if options.width else None
        )
        self.embeddings = nn.Parameter(torch.empty(geometry.num_experts, width))
        # Of one dimension: FSDP2 takes no parameter without.
        self.log_inverse_temperature = nn.Parameter(torch.empty(1))

    def initializers(self) -> dict[str, Initializer]:
        embeddings = orthogonal(0.32) if self.options.embedding_init == "orthogonal" else normal(0.01)
        return {
            "embeddings": embeddings,
            "log_inverse_temperature": constant(-math.log(self.options.temperature)),
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
        if self.options.normalize_tokens:
            x = F.normalize(x, dim=-1)
        scale = self.log_inverse_temperature.to(dtype).clamp(max=MOST_LOG_INVERSE_TEMPERATURE).exp()
        return scale * linear_fp32(x, embeddings)


class HalfCosine(Scorer):
    """`x . c_n / |c_n|`: the token side is not normalised. Centroids start orthogonal with gain 0.1.

    Source: what CompeteSMoE's code calls StableMoE.
    """

    class Config(Scorer.Config):
        kind = "half_cosine"
        equation = "s = f . unit(c)"

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        self.centroids = nn.Parameter(torch.empty(geometry.num_experts, features))

    def initializers(self) -> dict[str, Initializer]:
        return {"centroids": orthogonal(0.1)}

    def experts_matrix(self, shared: nn.Module | None) -> Tensor:
        return self.centroids

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        dtype = torch.promote_types(self.centroids.dtype, torch.float32)
        return linear_fp32(features, F.normalize(self.centroids.to(dtype), dim=-1))
