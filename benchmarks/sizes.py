"""The shapes that are measured, and what a step at them costs by count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from experiments.zoo_page.cost import router_cost
from rmoe.routing.options import Geometry
from rmoe.routing.zoo import resolve

FLOAT = 4
"""Bytes."""


@dataclass(frozen=True)
class Size:
    """A model and the batch of one step; pre-norm SwiGLU, as OLMoE and Mixtral are.

    Attributes:
        together: contestants that are in memory at once.
    """

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
    together: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def router_flops(self, router: str) -> int:
        """Of all layers, one token, forward."""
        return _router_flops(router, self.hidden, self.experts, self.top_k, self.layers, self.vocab)

    def expert_flops(self) -> int:
        """Of all layers' experts, one token, forward."""
        return self.layers * 2 * self.top_k * 3 * self.hidden * self.width

    def attention_flops(self, keys: float) -> float:
        """Of all layers' attention, one token that sees so many keys, forward."""
        return self.layers * (2 * 4 * self.hidden**2 + 2 * 2 * self.hidden * keys)

    def forward_flops(self, router: str, predicted: int | None = None) -> float:
        """Matrix products of a forward pass over the batch; the head over `predicted` positions, by default all."""
        trunk = self.attention_flops(self.length / 2) + self.expert_flops() + self.router_flops(router)
        head = 2 * self.hidden * self.vocab
        return self.tokens * trunk + (self.tokens if predicted is None else predicted) * head

    def step_flops(self, router: str) -> float:
        """Of a training step: forward, and twice that backward."""
        return 3 * self.forward_flops(router)

    def expert_weights(self) -> int:
        """Numbers in one layer's experts."""
        return self.experts * 3 * self.hidden * self.width

    def parameters(self, tokens: int | None = None) -> float:
        """Numbers in all matrices but the embedding and the routers; with `tokens`, those that many are sure to read.

        Tokens choose experts evenly and independently: an expert is missed by one with probability 1 - k / E.
        """
        read = 1.0 if tokens is None else 1 - (1 - self.top_k / self.experts) ** tokens
        layer = 4 * self.hidden**2 + read * self.expert_weights()
        return self.layers * layer + self.hidden * self.vocab

    def cache_bytes(self, sequences: int, positions: int) -> float:
        """Keys and values of so many positions."""
        return FLOAT * 2.0 * self.layers * sequences * positions * self.hidden


@cache
def _router_flops(router: str, hidden: int, experts: int, top_k: int, layers: int, vocab: int) -> int:
    geometry = Geometry(hidden, experts, top_k, num_layers=layers, vocab_size=vocab)
    return router_cost(resolve(router), geometry).flops_per_token


QUICK = Size("quick", 4, 96, 4, 8, 2, 64, 256, 8, 128)
MEDIUM = Size("medium", 8, 352, 8, 16, 2, 352, 256, 8, 512)
LARGE = Size("0.9B", 24, 1280, 20, 16, 4, 448, 32000, 4, 4096)
TOY = Size("toy", 2, 32, 2, 4, 2, 16, 64, 2, 16)

ON_CPU = {
    "toy": TOY,
    "quick": QUICK,
    "medium": replace(MEDIUM, layers=2, batch=4),
    "0.9B": replace(LARGE, layers=2, batch=1, length=512, together=5),
}
ON_GPU = {
    "toy": TOY,
    "quick": QUICK,
    "medium": replace(MEDIUM, batch=48),
    "0.9B": replace(LARGE, batch=1, together=2),
}
"""Widths are the models' own everywhere; a CPU gets fewer layers and shorter batches."""
