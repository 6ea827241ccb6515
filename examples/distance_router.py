"""A router of your own: experts sit at points, a token goes to the nearest.

Use it by name, with this file as a plugin:

    rmoe compare --preset quick --plugin examples/distance_router.py --routers smoe,distance,distance-rmoe
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmoe.routing import Geometry, ZooRow, register, resolve, vary
from rmoe.routing.initial import Initializer, normal
from rmoe.routing.noise import Noise
from rmoe.routing.scorer import Scorer
from rmoe.validation import Positive


class Distance(Scorer):
    """`s_n = -|f - c_n|^2 / sqrt(width)`, in at least float32: `[T, f]` -> `[T, E]`."""

    class Config(Scorer.Config):
        """Its options. `kind` is its name in a configuration; defining the class registers it."""

        kind = "distance"
        equation = "s = -|f - c|^2 / sqrt(width)"

        init_std: Positive = 0.5

    options: Config

    def __init__(self, options: Config, geometry: Geometry, features: int) -> None:
        super().__init__(options, geometry, features)
        self.centres = nn.Parameter(torch.empty(geometry.num_experts, features))

    def initializers(self) -> dict[str, Initializer]:
        return {"centres": normal(self.options.init_std)}

    def forward(self, features: Tensor, shared: nn.Module | None, noise: Noise | None) -> Tensor:
        dtype = torch.promote_types(features.dtype, torch.float32)
        f, c = features.to(dtype), self.centres.to(dtype)
        squares = f.square().sum(-1, keepdim=True) - 2 * f @ c.T + c.square().sum(-1)
        return -squares / self.features**0.5


register("distance", ZooRow(vary(resolve("smoe"), scorer=Distance.Config()), "examples", "nearest expert"))
register(
    "distance-rmoe",
    ZooRow(vary(resolve("rmoe"), scorer=Distance.Config()), "examples", "nearest expert, by state"),
)
