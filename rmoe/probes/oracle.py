"""The best a layer can do with k experts, for any posterior of the class: the reference lines of every probe.

Experts are linear, `W_n = M + D_n` with `D_n = A_n - M` and `M` the prior mean of the teachers `A_n`; what all experts
have in common costs no slot. For a posterior `q` the prediction `(M + sum_{n in S} w_n D_n) u`, `|S| = k`, has expected
squared error `sum_c q_c G_cc - b_S' G_SS^-1 b_S` per output, with `G = <D_m, D_n> / d_u` and `b = G q`, at the best
weights `w_S = G_SS^-1 b_S`. The best S is found by going through all of them. With S empty this is *blind*. A layer of
k slots has no free `M`, so this is a lower bound of its error, not always reached (docs/probes.md).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # tokens times choices


class BestExperts:
    """Every choice of experts for one layer's teachers.

    Args:
        teachers: `[E, d_u, d_u]` float64.
        prior: `[E]` float64.
        top_k: `k`.
    """

    def __init__(self, teachers: Tensor, prior: Tensor, top_k: int) -> None:
        self.mean = torch.einsum("c,cij->ij", prior, teachers)
        self.deviations = teachers - self.mean
        flat = self.deviations.flatten(1)
        self.gram = flat @ flat.T / teachers.shape[-1]
        self.choices = torch.tensor(list(combinations(range(teachers.shape[0]), top_k)))  # [C, k]
        self.inverse = torch.linalg.pinv(
            self.gram[self.choices[:, :, None], self.choices[:, None, :]], hermitian=True
        )
        self.blind = float(prior @ self.gram.diagonal())

    def errors(self, posterior: Tensor) -> Tensor:
        """The expected squared error with the best experts at their best weights, `[T]`, for posteriors `[T, E]`."""
        found = []
        for part in posterior.split(max(1, _AT_ONCE // len(self.choices))):
            b = (part @ self.gram)[:, self.choices]  # [T, C, k]
            weights = torch.einsum("tck,ckj->tcj", b, self.inverse)
            found.append(part @ self.gram.diagonal() - (weights * b).sum(-1).amax(-1))
        return torch.cat(found)
