"""What can be read off the weights alone: expert similarity (Fig. 5), router weight norm and spread (Fig. 11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmoe.moe import RoutedLayer, expert_vectors, scorer_matrix
from rmoe.records import Record

RANDOM_DRAWS = 16


class LayerWeights(Record, frozen=True, kw_only=True):
    """What the weights of one routed layer say.

    Attributes:
        similarity: of its experts; None where they are not plain tensors, or one alone.
        vector_width: numbers per expert in that comparison.
        router: norm and standard deviation of the scorer's matrix; None without one.
    """

    similarity: float | None
    vector_width: int
    router: tuple[float, float] | None


def layer_weights(layer: RoutedLayer, shared: nn.Module | None) -> LayerWeights:
    """Measure one layer. `shared` is what all routers share."""
    vectors, matrix = expert_vectors(layer), scorer_matrix(layer, shared)
    return LayerWeights(
        similarity=None if vectors is None or len(vectors) < 2 else mean_pairwise_cosine(vectors),
        vector_width=0 if vectors is None else vectors.shape[1],
        router=None if matrix is None else norm_and_std(matrix),
    )


def mean_pairwise_cosine(vectors: Tensor) -> float:
    """Mean cosine over all pairs of different rows of [E, D]; from the norm of the sum, not pair by pair.

        |sum_e v_e|^2 = E + sum over ordered pairs of cos   for unit vectors v_e

    >>> mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    0.0
    """
    unit = nn.functional.normalize(vectors.double(), dim=-1)
    count = len(unit)
    return float((unit.sum(0).square().sum() - count) / (count * (count - 1)))


def random_similarity(num_experts: int, widths: list[int], seed: int, draws: int = RANDOM_DRAWS) -> float:
    """`mean_pairwise_cosine` of experts at random initialisation: the reference line of Fig. 5.

    The mean over a matrix's hidden units of independent normal entries is again normal, and its scale is lost
    in the normalisation; so one vector per matrix is drawn, not the matrix.

    Args:
        num_experts: E.
        widths: length of the vector that each matrix contributes.
        seed: of the draws, whose mean is returned.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        parts = [torch.randn(num_experts, width, generator=generator) for width in widths]
        values.append(
            mean_pairwise_cosine(torch.cat([nn.functional.normalize(p, dim=-1) for p in parts], dim=-1))
        )
    return sum(values) / draws


def norm_and_std(matrix: Tensor) -> tuple[float, float]:
    """Frobenius norm of G and the standard deviation of its entries (about their mean, divided by their number)."""
    wide = matrix.detach().double()
    return float(wide.norm()), float(wide.std(correction=0))
