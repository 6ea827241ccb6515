"""Sums over micro-batches, steps and ranks: what one optimizer step did, and what the next metrics row will say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmoe.analysis.load import load_imbalance
from rmoe.routing.balance import summed_over_ranks
from rmoe.routing.contract import RouterStats
from rmoe.training.place import Ranks


class StepSums:
    """One optimizer step: losses and routing, summed over micro-batches and ranks.

    Attributes:
        stats: this rank's, over the micro-batches so far; after `finish` those of all ranks. None before the
            first, or for a model without routers.
    """

    def __init__(self, ranks: Ranks = Ranks()) -> None:  # noqa: B008 - it is frozen
        self.ranks = ranks
        self.stats: RouterStats | None = None
        self._losses: Tensor | None = None

    def add(self, lm_loss: Tensor, balance_loss: Tensor, stats: RouterStats | None) -> None:
        """Add a micro-batch.

        Args:
            lm_loss: this rank's and micro-batch's share of the step's mean loss: shares add up to it.
            balance_loss: this micro-batch's part of the mean over micro-batches; what ranks with different
                sequences have is averaged.
            stats: routing of this rank's micro-batch.
        """
        losses = torch.stack([lm_loss.detach().double(), balance_loss.detach().double() / self.ranks.data])
        self._losses = losses if self._losses is None else self._losses + losses
        if stats is not None:
            self.stats = stats if self.stats is None else self.stats.add(stats)

    def finish(self, finite: bool, stop: bool) -> tuple[float, float, bool, bool]:
        """(lm_loss, balance_loss, finite, stop) of the step, the same on every rank. Once, after the last `add`.

        Args:
            finite: whether this rank's gradients are.
            stop: whether this rank was asked to stop.
        """
        assert self._losses is not None
        flags = torch.tensor([not finite, stop], dtype=torch.float64, device=self._losses.device)
        total = torch.cat([self._losses * self.ranks.speaks, flags])
        if self.ranks.world > 1:
            total = summed_over_ranks(total)
            if self.stats is not None:
                self.stats = self.stats.map(lambda part: summed_over_ranks(part * self.ranks.speaks))
        lm_loss, balance_loss, bad, asked = total.tolist()
        return lm_loss, balance_loss, bad == 0 and bool(np.isfinite(lm_loss + balance_loss)), asked > 0


@dataclass
class Window:
    """Sums since the last metrics row. Plain numbers: a checkpoint carries them, so rows survive a kill."""

    steps: int = 0
    lm_loss: float = 0.0
    balance_loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    counts: list[list[int]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    logit_variance: list[float] = field(default_factory=list)
    dropped: int = 0
    routed: int = 0

    def add(self, lm_loss: float, balance_loss: float, tokens: int, stats: RouterStats | None) -> None:
        """Add an optimizer step that was taken."""
        self.steps += 1
        self.lm_loss += lm_loss
        self.balance_loss += balance_loss
        self.tokens += tokens
        if stats is not None:
            counts = stats.counts.cpu().numpy()
            self.counts = (counts + np.array(self.counts, dtype=np.int64) if self.counts else counts).tolist()
            self.entropy = _summed(self.entropy, stats.entropy)
            self.logit_variance = _summed(self.logit_variance, stats.logit_variance)
            self.dropped += int(stats.dropped.sum())
            self.routed += int(stats.tokens)

    def row(self) -> dict[str, Any]:
        """The means, as `rmoe.training.metrics` names them; losses are None where no step was taken."""
        steps = self.steps
        lm_loss = self.lm_loss / steps if steps else None
        balance_loss = self.balance_loss / steps if steps else None
        row: dict[str, Any] = {
            "loss": None if lm_loss is None or balance_loss is None else lm_loss + balance_loss,
            "lm_loss": lm_loss,
            "balance_loss": balance_loss,
            "tokens_per_s": self.tokens / self.seconds if self.seconds else None,
        }
        if self.routed:
            counts = np.array(self.counts)
            row["gate_entropy"] = (np.array(self.entropy) / self.routed).tolist()
            row["logit_std"] = np.sqrt(np.array(self.logit_variance) / self.routed).tolist()
            row["load_imbalance"] = load_imbalance(counts).tolist()
            row["dropped"] = self.dropped / max(int(counts.sum()), 1)
        return row


def _summed(before: list[float], more: Tensor) -> list[float]:
    """A sum per layer; empty stands for zeros."""
    values = more.double().cpu().numpy()
    return (values + np.array(before) if before else values).tolist()
