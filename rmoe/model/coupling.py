"""Expert-router coupling (ERC, 2512.23447): a router's vector of an expert stands for the tokens that the expert gets.

Fed through the experts, each vector should excite its own expert most, and each expert should be excited most by its
own. The loss depends on weights alone: its cost, `2 E^2 I d` FLOPs a layer forward, is that of `E` tokens through all
experts' first matrices, whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmoe.routing.noise import Noise


def proxies(vectors: Tensor, noise: Noise | None) -> Tensor:
    """Each router vector, every part multiplied by `U(1 - e, 1 + e)`: `[E, d]`.

    `e_i = min(1, min_j || R_i - R_j || / (2 || R_i ||))`: a proxy stays at least as near to its own vector as to any
    other. The source was read in a summary that leaves the size of `e` open.

    Args:
        vectors: `R`. noise: None leaves them as they are.
    """
    if noise is None:
        return vectors
    fixed = vectors.detach()
    apart = torch.cdist(fixed, fixed).fill_diagonal_(torch.inf).amin(-1)
    norms = torch.linalg.vector_norm(fixed, dim=-1).clamp(min=torch.finfo(fixed.dtype).tiny)
    reach = (apart / (2 * norms)).clamp(max=1)[:, None]
    return vectors * (1 + reach * (2 * noise.uniform(fixed) - 1))


def erc_loss(vectors: Tensor, weights: Tensor, alpha: float, noise: Noise | None) -> Tensor:
    """`1 / E^2 sum_{i != j} max(0, M_ij - a M_ii) + max(0, M_ji - a M_ii)`, `M_ij = || W_j R~_i ||`: a scalar.

    Args:
        vectors: `[E, d]`, the router's, at least float32; E above 1.
        weights: `[E, I, d]`, the experts' gate matrices, or where they have none their first.
        alpha: `a`; the smaller, the more an expert is to prefer its own.
        noise: of the proxies.
    """
    experts = len(vectors)
    inner = torch.einsum("id,jnd->ijn", proxies(vectors, noise), weights.to(vectors.dtype))
    norms = torch.linalg.vector_norm(inner, dim=-1)  # [i, j]
    own = alpha * norms.diagonal()[:, None]
    above = (norms - own).relu() + (norms.mT - own).relu()
    others = ~torch.eye(experts, dtype=torch.bool, device=norms.device)
    return (above * others).sum() / experts**2
