"""What an RMoE model returns: transformers' MoE outputs and the routing beside them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from rmoe.routing.contract import RouterContext, RouterStats, Routing


@dataclass
class RMoEModelOutputWithPast(MoeModelOutputWithPast):
    """Output of the trunk.

    Attributes:
        routing: one `Routing` per routing layer.
        router_stats: sums over this call's real tokens; None while decoding (one token a sequence, with a cache),
            where nobody learns from them and they would be a fortieth of a small model's step.
        context: mask and shape the routing was done under.
    """

    routing: tuple[Routing, ...] | None = None
    router_stats: RouterStats | None = None
    context: RouterContext | None = None


@dataclass
class RMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Output of the language model; `loss = lm_loss + balance_loss`.

    Attributes:
        lm_loss: mean cross-entropy in nats, or its sum over `num_items_in_batch`.
        balance_loss: all balance losses with their weights: what is added to `lm_loss`, times this call's share of
            `num_items_in_batch` where that is given.
        aux_loss: the same over `router_aux_loss_coef` (unless that is 0): transformers' convention, so that programs
            which compute `loss + coef * aux_loss` themselves get what this model means.
        routing: one `Routing` per routing layer, when asked for.
        router_stats: sums over this call's real tokens, asked for or not; None while decoding.
    """

    lm_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    router_stats: RouterStats | None = None


@dataclass
class RMoESequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of the classifier; `loss = task_loss + balance_loss`."""

    router_logits: tuple[Tensor, ...] | None = None
    task_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    routing: tuple[Routing, ...] | None = None
    router_stats: RouterStats | None = None
