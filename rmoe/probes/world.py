"""One world of a probe: its cues and teachers, its tokens, and its reference lines.

A stack of L routed layers without attention. Layer l sees `o_l = [cue_l ; content_l]` and must give
`y_l = A_{l, c_l} content_l`. Everything random is keyed by (seed, probe, purpose), so every router of a seed meets the
same world and the same batches.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.probes.oracle import BestExperts
from rmoe.probes.suite import PROBES
from rmoe.results.probes import Knobs, Reference
from rmoe.routing.initial import keyed_generator

CUE, CONTENT = 16, 16
HIDDEN = CUE + CONTENT
CUE_NORM = 2.0
TEST_TOKENS, CURVE_TOKENS = 2048, 512
BLOCK = 32  # steps drawn at once


class Tokens(NamedTuple):
    """Attributes:
    inputs: `[L, T, d]`, what routers read.
    targets: `[L, T, d_u]`.
    classes: `[L, T]` int64, the class that decides the target.
    """

    inputs: Tensor
    targets: Tensor
    classes: Tensor


class World:
    """A probe under one seed."""

    def __init__(self, probe: str, seed: int, knobs: Knobs, dtype: torch.dtype = torch.float32) -> None:
        self.probe, self.seed, self.knobs, self.dtype = probe, seed, knobs, dtype
        task = PROBES[probe](knobs)
        self.chain, self.sigma = task.chain(), task.sigma
        generator = keyed_generator(seed, f"{probe}/world")
        shape = (knobs.layers, knobs.experts)
        cues = torch.randn(*shape, CUE, dtype=torch.float64, generator=generator)
        cues = CUE_NORM * cues / cues.norm(dim=-1, keepdim=True)
        self.cues = torch.cat((cues, torch.zeros(knobs.layers, 1, CUE, dtype=torch.float64)), 1)  # E: no cue
        teachers = torch.randn(*shape, CONTENT, CONTENT, dtype=torch.float64, generator=generator)
        self.teachers = teachers / CONTENT**0.5

    def tokens(self, count: int, purpose: str) -> Tokens:
        """Draw tokens for a purpose: `test`, `curve`, or a block of training."""
        generator = keyed_generator(self.seed, f"{self.probe}/{purpose}")
        shown, asked = self.chain.draw(count, generator)
        inputs = torch.randn(self.knobs.layers, count, HIDDEN, dtype=self.dtype, generator=generator)
        cue, content = inputs.split((CUE, CONTENT), -1)
        targets = torch.empty_like(content)
        cues, teachers = self.cues.to(self.dtype), self.teachers.to(self.dtype)
        for layer in range(self.knobs.layers):
            cue[layer].mul_(self.sigma).add_(cues[layer][shown[layer]])
            for c in range(self.knobs.experts):
                (mine,) = torch.where(asked[layer] == c)
                targets[layer, mine] = content[layer, mine] @ teachers[layer, c].T
        return Tokens(inputs, targets, asked)

    def evidence(self, inputs: Tensor) -> Tensor:
        """Log-density of each cue under each class, and under none, up to a constant: `[L, T, E + 1]` float64."""
        cue = inputs[..., :CUE].double()
        return -(cue[:, :, None] - self.cues[:, None]).square().sum(-1) / (2 * self.sigma**2)

    @cached_property
    def best(self) -> list[BestExperts]:
        """One per layer."""
        prior = self.chain.prior()
        return [BestExperts(a, q, self.knobs.top_k) for a, q in zip(self.teachers, prior, strict=True)]

    def reference(self, inputs: Tensor) -> Reference:
        """The three lines on these tokens: exact in class and content, given their cues."""
        stateless, oracle = (
            [float(best.errors(q).mean()) for best, q in zip(self.best, posterior, strict=True)]
            for posterior in self.chain.posterior(self.evidence(inputs))
        )
        return Reference(blind=[best.blind for best in self.best], stateless=stateless, oracle=oracle)

    @cached_property
    def test(self) -> Tokens:
        return self.tokens(TEST_TOKENS, "test")

    @cached_property
    def curve(self) -> Tokens:
        return self.tokens(CURVE_TOKENS, "curve")

    @cached_property
    def test_reference(self) -> Reference:
        return self.reference(self.test.inputs)

    @cached_property
    def curve_reference(self) -> Reference:
        return self.reference(self.curve.inputs)


@lru_cache(maxsize=64)
def world(probe: str, seed: int, knobs: Knobs, dtype: torch.dtype = torch.float32) -> World:
    """A world, kept: every router of a run meets the same ones."""
    return World(probe, seed, knobs, dtype)


def batches(worlds: list[World], steps: int, tokens: int):  # type: ignore[no-untyped-def]
    """Training batches of all worlds, stacked: inputs `[S, L, T, d]` and targets `[S, L, T, d_u]`, step by step."""
    for first in range(0, steps, BLOCK):
        drawn = [w.tokens(BLOCK * tokens, f"train/{first}") for w in worlds]
        parts = [
            torch.stack([getattr(one, name) for one in drawn]).unflatten(2, (BLOCK, tokens))
            for name in ("inputs", "targets")
        ]
        for step in range(min(BLOCK, steps - first)):
            yield parts[0][:, :, step], parts[1][:, :, step]
