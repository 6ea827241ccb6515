"""Activation checkpointing that keeps routing decisions.

A recomputed layer may round differently from the first time (another kernel, another split of the batch), and two
scores that are close may change places: the backward pass would then go through experts that the forward pass never
asked. What a layer decides, integers and truth values, is small and therefore kept: `[T, k]` of an activation's
`[T, d]`. Everything between decisions is recomputed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rmoe.compat import HAS_ACTIVATION_CHECKPOINTING

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


class NonReentrant:
    """Mixin of models whose layers are checkpointed, but never in the reentrant form.

    That form silently loses the balance losses' gradient (RMoE) and cannot carry a tuple between layers (grafts).

    Attributes:
        checkpoint_context: `context_fn` of `torch.utils.checkpoint.checkpoint` where the caller names none.
    """

    checkpoint_context: Callable[[], Any] | None = None

    def _checkpoint_options(self, given: dict[str, Any] | None) -> dict[str, Any]:
        options: dict[str, Any] = {"use_reentrant": False}
        if self.checkpoint_context is not None:
            options["context_fn"] = self.checkpoint_context
        options |= given or {}
        if options["use_reentrant"]:
            warnings.warn(
                "use_reentrant=True would lose the balance loss's gradient: layers are checkpointed non-reentrantly",
                UserWarning,
                stacklevel=3,
            )
            options["use_reentrant"] = False
        return options

    if HAS_ACTIVATION_CHECKPOINTING:

        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            """As in transformers, which gets `kwargs` as they are; `use_reentrant=True` warns and is not heeded."""
            options = self._checkpoint_options(activation_checkpointing_kwargs)
            super().activation_checkpointing_enable(options, **kwargs)  # type: ignore[misc]

    else:

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
        ) -> None:
            """As in transformers, which gets `kwargs` as they are; `use_reentrant=True` warns and is not heeded."""
            options = self._checkpoint_options(gradient_checkpointing_kwargs)
            super().gradient_checkpointing_enable(options, **kwargs)  # type: ignore[misc]
