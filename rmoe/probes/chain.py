"""A probe's hidden world as a Markov chain over layers: how it is drawn, and what can be known of it.

One chain says both, so the generator and its oracle cannot disagree: tokens are drawn from it, and the exact posterior
of the class is its forward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Chain(NamedTuple):
    """Hidden states `z_0 .. z_{L-1}`, one per layer. All tensors are float64 or int64.

    Attributes:
        start: `[Z]`, P(z_0).
        step: `[L - 1, Z, Z]`, P(z_l = column | z_{l-1} = row).
        shown: `[L, Z]` int64, the class whose cue layer l shows in state z; `E` is no cue, noise alone.
        label: `[Z]` int64, the class that decides the layer's target in state z.
        classes: `E`.
    """

    start: Tensor
    step: Tensor
    shown: Tensor
    label: Tensor
    classes: int

    @property
    def layers(self) -> int:
        return self.shown.shape[0]

    def draw(self, tokens: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw tokens: the classes shown and the classes asked for, both `[L, tokens]` int64."""
        uniforms = torch.rand(self.layers, tokens, dtype=torch.float64, generator=generator)
        shown, asked = torch.empty(2, self.layers, tokens, dtype=torch.int64)
        state = torch.zeros(tokens, dtype=torch.int64)
        for layer in range(self.layers):
            rows = self.start[None] if layer == 0 else self.step[layer - 1]
            # Inverse transform: a flat search, each row's cumulative sum lifted by its own index.
            total = rows.cumsum(-1)
            total = total / total[:, -1:]
            lift = torch.arange(rows.shape[0], dtype=torch.float64)
            total = (total + lift[:, None]).flatten()
            drawn = torch.searchsorted(total, uniforms[layer] + state, right=True)
            state = torch.minimum(drawn - state * rows.shape[1], torch.tensor(rows.shape[1] - 1))
            shown[layer], asked[layer] = self.shown[layer][state], self.label[state]
        return shown, asked

    def marginals(self) -> Tensor:
        """P(z_l) before any cue, `[L, Z]`."""
        found = [self.start]
        for step in self.step:
            found.append(found[-1] @ step)
        return torch.stack(found)

    def prior(self) -> Tensor:
        """P(class) per layer before any cue, `[L, E]`."""
        return self._by_class(self.marginals())

    def posterior(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """The class's exact posterior at each layer.

        Args:
            evidence: `[L, T, E + 1]`, log-density of a layer's cue if it shows class n; the last if it shows none.

        Returns:
            Given this layer's cue alone, and given all cues up to this layer (the forward algorithm): `[L, T, E]` each.
        """
        index = self.shown[:, None, :].expand(-1, evidence.shape[1], -1)
        likelihood = evidence.gather(-1, index)  # [L, T, Z]
        likelihood = (likelihood - likelihood.amax(-1, keepdim=True)).exp()
        alone = self.marginals()[:, None] * likelihood
        reached = self.start.expand(evidence.shape[1], -1)
        forward: list[Tensor] = []
        for layer in range(self.layers):
            if layer:
                reached = forward[-1] @ self.step[layer - 1]
            seen = reached * likelihood[layer]
            forward.append(seen / seen.sum(-1, keepdim=True))
        return self._by_class(alone / alone.sum(-1, keepdim=True)), self._by_class(torch.stack(forward))

    def _by_class(self, states: Tensor) -> Tensor:
        """Sum `[*, Z]` over the states of each class: `[*, E]`."""
        return states @ torch.nn.functional.one_hot(self.label, self.classes).to(states.dtype)
