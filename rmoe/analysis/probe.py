"""What a linear probe finds of the next layer's choice in what one layer reads, or in the state it passes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-3
"""Of the mean variance of a feature, added to each feature's own."""


class ChoiceProbe:
    """Streams top-k recall of choices from features, by ridge regression on the first tokens of the text.

        W = (X'X + r I)^-1 X'Y     X [n, f] features, Y [n, E] 1 where an expert is chosen, both about their means;
                                   r = 10^-3 of the mean diagonal of X'X
        recall = |top-k of W'x & chosen| / |chosen|, mean over the other tokens

    Sums are float64; memory is O(f^2 + f E) for each of the M probes. The fit is on consecutive text and the recall on
    the text after it, so neighbouring tokens do not leak.

    Args:
        sizes: (E, k) of each probe's choice.
        fit_tokens: so many tokens are fitted on, and all later ones tested.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], fit_tokens: int) -> None:
        self.sizes, self.fit_tokens = sizes, fit_tokens
        self._moments: list[tuple[Tensor, Tensor] | None] = [None] * len(sizes)
        self._weights: list[Tensor | None] = [None] * len(sizes)
        self._sums, self._counts = [0.0] * len(sizes), [0] * len(sizes)
        self._seen = 0

    def update(self, features: Sequence[Tensor | None], chosen: Sequence[Tensor]) -> None:
        """Add the next tokens.

        Args:
            features: of each probe [T, f], or None where there are none.
            chosen: of each probe [T, K] int64, E or more in empty slots.
        """
        fit = min(max(self.fit_tokens - self._seen, 0), len(chosen[0]))
        for at, (x, choice) in enumerate(zip(features, chosen, strict=True)):
            if x is None:
                continue
            ones = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
            wide = torch.cat([x.double(), ones], dim=-1)  # the last feature is the constant
            if fit:
                self._fit(at, wide[:fit], choice[:fit])
            if fit < len(x):
                self._test(at, wide[fit:], choice[fit:])
        self._seen += len(chosen[0])

    def _fit(self, at: int, x: Tensor, choice: Tensor) -> None:
        experts = self.sizes[at][0]
        wanted = torch.zeros(len(x), experts + 1, dtype=torch.float64, device=x.device)
        wanted = wanted.scatter_(1, choice.clamp(max=experts), 1.0)[:, :experts]
        squares, products = x.T @ x, x.T @ wanted
        if (sums := self._moments[at]) is not None:
            squares, products = squares + sums[0], products + sums[1]
        self._moments[at] = squares, products

    def _test(self, at: int, x: Tensor, choice: Tensor) -> None:
        if (sums := self._moments[at]) is not None:
            self._weights[at], self._moments[at] = ridge(*sums), None
        if (weights := self._weights[at]) is None:
            return
        recall, count = top_k_recall(x @ weights, choice, self.sizes[at][1])
        self._sums[at] += recall
        self._counts[at] += count

    def result(self) -> list[float | None]:
        """Recall of each probe; None where nothing was tested."""
        return [s / c if c else None for s, c in zip(self._sums, self._counts, strict=True)]


def ridge(squares: Tensor, products: Tensor) -> Tensor:
    """The weights [f + 1, E] of features whose last one is the constant 1, which is not shrunk.

    Args:
        squares: X'X, [f + 1, f + 1]. products: X'Y, [f + 1, E].
    """
    n, mean, target = squares[-1, -1], squares[-1, :-1] / squares[-1, -1], products[-1] / squares[-1, -1]
    covariance = squares[:-1, :-1] - n * torch.outer(mean, mean)
    shift = RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
    covariance.diagonal().add_(shift)
    weights = torch.linalg.solve(covariance, products[:-1] - n * torch.outer(mean, target))
    return torch.cat([weights, (target - mean @ weights)[None]])


def top_k_recall(scores: Tensor, chosen: Tensor, k: int) -> tuple[float, int]:
    """Sum over tokens of the share of a token's experts that are among the k largest scores; and the tokens that count.

    Args:
        scores: [T, E]. chosen: [T, K] int64, E or more in empty slots; a token without experts does not count.
    """
    used = chosen < scores.shape[-1]
    predicted = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, -1).indices, True)
    hit = predicted.gather(-1, chosen.clamp(max=scores.shape[-1] - 1)) & used
    counted = used.any(-1)
    share = hit.sum(-1)[counted].double() / used.sum(-1)[counted]
    return float(share.sum()), int(counted.sum())
