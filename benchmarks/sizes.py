"""The shapes that are measured, and what a training step at them costs by count."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rmoe.routing.cost import router_cost
from rmoe.routing.spec import Geometry
from rmoe.routing.zoo import resolve


@dataclass(frozen=True)
class Size:
    """A model and the batch of one step; pre-norm SwiGLU, as OLMoE and Mixtral are."""

    name: str
    layers: int
    hidden: int
    heads: int
    experts: int
    top_k: int
    width: int
    vocab: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def router_flops(self, router: str) -> int:
        """Of all layers, one token, forward."""
        geometry = Geometry(
            self.hidden, self.experts, self.top_k, num_layers=self.layers, vocab_size=self.vocab
        )
        return router_cost(resolve(router), geometry).flops_per_token

    def expert_flops(self) -> int:
        """Of all layers' experts, one token, forward."""
        return self.layers * 2 * self.top_k * 3 * self.hidden * self.width

    def step_flops(self, router: str) -> int:
        """Matrix products of a training step: forward, and twice that backward; half of attention is masked."""
        attention = self.layers * (2 * 4 * self.hidden**2 + 2 * self.hidden * self.length)
        head = 2 * self.hidden * self.vocab
        return 3 * self.tokens * (attention + self.expert_flops() + head + self.router_flops(router))


QUICK = Size("quick", 4, 96, 4, 8, 2, 64, 256, 8, 128)
MEDIUM = Size("medium", 8, 352, 8, 16, 2, 352, 256, 8, 512)
LARGE = Size("0.9B", 24, 1280, 20, 16, 4, 448, 32000, 4, 4096)
TOY = Size("toy", 2, 32, 2, 4, 2, 16, 64, 2, 16)

ON_CPU = {
    "toy": TOY,
    "quick": QUICK,
    "medium": replace(MEDIUM, layers=2, batch=4),
    "0.9B": replace(LARGE, layers=2, batch=1, length=512),
}
ON_GPU = {"toy": TOY, "quick": QUICK, "medium": replace(MEDIUM, batch=48), "0.9B": LARGE}
"""Widths are the models' own everywhere; a CPU gets fewer layers and shorter batches."""
