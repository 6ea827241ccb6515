"""Which models a layout can carry, said once: for training, for library calls and for plans. Imports no torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from rmoe.errors import RequestError
from rmoe.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from rmoe.model import RMoEConfig


def misfit(config: RMoEConfig, parallel: ParallelConfig) -> RequestError | None:
    """Why a model cannot be spread in this layout; None: it can."""
    if parallel.pipeline > 1:
        return pipeline_misfit(config, parallel.pipeline)
    if not parallel.shards:
        return None
    heads, pairs = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    if config.tie_word_embeddings and parallel.tensor > 1:
        return RequestError("tie_word_embeddings", True, "False with parallel.tensor")
    if math.gcd(heads, pairs) % parallel.tensor:
        allowed = f"a divisor of num_attention_heads ({heads}) and num_key_value_heads ({pairs})"
        return RequestError("parallel.tensor", parallel.tensor, allowed)
    experts = config.num_built_experts
    if experts % parallel.expert:
        return RequestError("parallel.expert", parallel.expert, f"a divisor of a layer's experts ({experts})")
    return config.cut_experts_misfit() if parallel.expert * parallel.tensor > 1 else None


def pipeline_misfit(config: RMoEConfig, count: int) -> RequestError | None:
    """Why a model cannot be a pipeline of `count` stages, be it one; None: it can."""
    spec = config.router_spec
    if not 1 <= count <= config.num_hidden_layers:
        return RequestError(
            "parallel.pipeline", count, f"1 to num_hidden_layers ({config.num_hidden_layers})"
        )
    if config.tie_word_embeddings:
        return RequestError("tie_word_embeddings", True, "False: the two ends are on different stages")
    if spec.router.needs_token_ids:
        return RequestError("router.kind", spec.router.kind, "a router that needs no token ids")
    if spec.balance.scope != "micro_batch":
        return RequestError("balance.scope", spec.balance.scope, "micro_batch, in a pipeline")
    if config.dense_gradients == "default":
        return RequestError("dense_gradients", "default", "null or densemixer, in a pipeline")
    return None


def stage_layers(layers: int, count: int) -> list[range]:
    """The layers of each of `count` stages of a pipeline: as even as they can be, later stages have the odd ones."""
    ends = [index * layers // count for index in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def require_fit(config: RMoEConfig, parallel: ParallelConfig) -> None:
    """Check that a model can be spread in this layout.

    Raises:
        RequestError: it cannot.
    """
    reason = misfit(config, parallel)
    if reason is not None:
        raise reason
