"""Activation checkpointing that keeps routing decisions.

A recomputed layer may round differently from the first time (another kernel, another split of the batch), and two
scores that are close may change places: the backward pass would then go through experts that the forward pass never
asked. What a layer decides, integers and truth values, is small and therefore kept: `[T, k]` of an activation's
`[T, d]`. Everything between decisions is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten = torch.ops.aten

DECISIONS = frozenset(
    {
        aten.topk.default,
        aten.argmax.default,
        aten.max.dim,
        aten.sort.stable,
        *(getattr(getattr(aten, name), kind) for name in ("lt", "le", "gt", "ge") for kind in ("Scalar", "Tensor")),
        aten.eq.Tensor,
    }
)  # fmt: skip
"""Operators by which routers choose: experts, and thresholds that fill or empty a slot."""


def keep_decisions() -> Any:
    """A `context_fn` of `torch.utils.checkpoint.checkpoint`: recomputation takes decisions from the forward pass."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in DECISIONS else CheckpointPolicy.PREFER_RECOMPUTE
