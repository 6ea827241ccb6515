"""A router of your own: experts sit at points, a token goes to the nearest.

Use it by name, with this file as a plugin:

    rmoe compare --preset quick --plugin examples/distance_router.py --routers smoe,distance,distance-rmoe
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmoe.routing import Geometry, ZooRow, register, resolve, vary
from rmoe.routing.initial import Initializer, normal
from rmoe.routing.noise import Noise
from rmoe.routing.scorer import Scorer
from rmoe.routing.spec import ScorerSpec


class DistanceScorer(Scorer):
    """`s_n = -|f - c_n|^2 / sqrt(width)`, in at least float32: `[T, f]` -> `[T, E]`."""

    def __init__(self, geometry: Geometry, features: int, init_std: float) -> None:
        super().__init__(geometry, features)
        self.centres = nn.Parameter(torch.empty(geometry.num_experts, features))
        self.init_std = init_std

    def initializers(self) -> dict[str, Initializer]:
        return {"centres": normal(self.init_std)}

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        dtype = torch.promote_types(features.dtype, torch.float32)
        f, c = features.to(dtype), self.centres.to(dtype)
        squares = f.square().sum(-1, keepdim=True) - 2 * f @ c.T + c.square().sum(-1)
        return -squares / self.features**0.5


@dataclass(frozen=True, kw_only=True)
class Distance(ScorerSpec):
    """Its options: the fields; its name in a configuration: `kind`. Defining the class registers it."""

    kind = "distance"
    equation = "s = -|f - c|^2 / sqrt(width)"

    init_std: float = 0.5

    def check(self) -> None:
        self.positive("init_std")

    def build(self, geometry: Geometry, features: int) -> nn.Module:
        return DistanceScorer(geometry, features, self.init_std)


register("distance", ZooRow(vary(resolve("smoe"), scorer=Distance()), "examples", "nearest expert"))
register(
    "distance-rmoe", ZooRow(vary(resolve("rmoe"), scorer=Distance()), "examples", "nearest expert, by state")
)
