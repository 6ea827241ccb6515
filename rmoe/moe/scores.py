"""What a family chooses by: the function of the router's logits that gives the weights of the chosen experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrt_softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "probabilities": lambda logits: logits,  # of routers that return them where others return logits
}
"""Name -> the scores of all classes, from what the router returns."""

TOLERANCE = 0.02
"""Of ratios between a token's weights and between its scores: bfloat16 rounds each to 0.4%."""


def disproportion(weights: Tensor, scores: Tensor, used: Tensor) -> float:
    """How far tokens' weights are from their scores, both over their sums (as they are, where there is one choice).

    Args:
        weights, scores: `[T, K]`, of the chosen experts.
        used: `[T, K]` bool; slots without an expert count for nothing.
    """
    weights, scores = weights * used, scores * used
    if weights.shape[-1] > 1:
        weights, scores = (part / part.sum(-1, keepdim=True) for part in (weights, scores))
    error = (weights - scores).abs() / scores.abs().clamp(min=torch.finfo(scores.dtype).tiny)
    return float(error[used].nan_to_num(torch.inf).max()) if used.any() else 0.0
