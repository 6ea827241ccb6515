"""What every router takes and gives: `(hidden, state) -> (Routing, state)`.

All are plain tuples of tensors, so gradient checkpointing, `torch.compile`, pipelines and generation carry
them without knowing what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.routing.noise import Noise

State = tuple[Tensor, ...]
"""What a token carries up the layers, each part `[T, *]`; `()` before the first layer, and without memory."""


class RouterContext(NamedTuple):
    """What a router may know besides the hidden states and its state.

    Attributes:
        batch, length: the `T = batch * length` tokens are this many sequences of this length, in order.
        mask: `[T]` bool, False at padding; None means no padding.
        token_ids: `[T]` int64; None when the model was given embeddings.
        noise: the stream for routing noise; None outside training.
    """

    batch: int
    length: int
    mask: Tensor | None = None
    token_ids: Tensor | None = None
    noise: Noise | None = None


class Routing(NamedTuple):
    """One layer's decision for `T` tokens.

    Attributes:
        logits: `[T, C]`, raw scores before temperature, bias and noise; at least float32. `C` is `E`, and more with
            classes that are no experts: a skip class, or experts that compute nothing.
        probs: `[T, C]`, the distribution the gate chose from; at least float32; rows sum to one.
        weights: `[T, K]`, what each chosen expert's output is multiplied by; at least float32, 0 in an empty slot.
        experts: `[T, K]` int64, the choice; the value `E` marks an empty slot (skipped or not used).
        passthrough: `[T]`, what the layer's input is multiplied by and added to its output; None is nothing.
        penalty: scalar, the mechanism's own loss with its weight; None is nothing.
        dropped: `[T, K]` bool, choices lost to the capacity limit (their weight is 0); None is none.
        observed: `[O]`, in training: sums over the real tokens that training-time state is made of; None is none.
        added: `[T, d]`, what constant experts add to the layer's output; None is nothing.
        shared_weights: `[T, S]`, what each shared expert's output is multiplied by; None is 1.
        classes: `[T, K]` int64, the choice among all C classes, `C` in an empty slot; None is `experts`. What was asked
            of classes that compute nothing is in it alone.
        experts_matrix: `[C, f]`, what tokens were compared with, where a balance loss reads it; None where none does,
            or there is no such matrix.
    """

    logits: Tensor
    probs: Tensor
    weights: Tensor
    experts: Tensor
    passthrough: Tensor | None = None
    penalty: Tensor | None = None
    dropped: Tensor | None = None
    observed: Tensor | None = None
    added: Tensor | None = None
    shared_weights: Tensor | None = None
    classes: Tensor | None = None
    experts_matrix: Tensor | None = None

    def with_penalty(self, more: Tensor) -> Routing:
        """The same with one more loss, a scalar with its weight, beside any that it has."""
        return self._replace(penalty=more if self.penalty is None else self.penalty + more)


class RouterStats(NamedTuple):
    """Sums over the real (unpadded) tokens of one or more forward passes; they add up over micro-batches and ranks.

    Attributes:
        counts: `[L, E]` int64, assignments per layer and expert.
        tokens: scalar int64.
        entropy: `[L]` float32, sum over tokens of the gate entropy in nats.
        dropped: `[L]` int64, assignments lost to the capacity limit.
        logit_variance: `[L]` float32, sum over tokens of the sample variance of the raw logits over experts.
        observed: `[L, O]`, what the routers' training-time state is made of beyond these; None where nothing is.
    """

    counts: Tensor
    tokens: Tensor
    entropy: Tensor
    dropped: Tensor
    logit_variance: Tensor
    observed: Tensor | None = None

    def add(self, other: RouterStats) -> RouterStats:
        """The sums over both."""
        mine, others = self.observed, other.observed
        observed = (
            mine + others if mine is not None and others is not None else mine if others is None else others
        )
        sums = [a + b for a, b in zip(self[:5], other[:5], strict=True)]
        return RouterStats(*sums)._replace(observed=observed)

    def map(self, function: Callable[[Tensor], Tensor]) -> RouterStats:
        """Each of the sums through a function."""
        mapped = RouterStats(*[function(part) for part in self[:5]])
        return mapped if self.observed is None else mapped._replace(observed=function(self.observed))


def on_device(routings: Sequence[Routing], device: torch.device) -> tuple[Routing, ...]:
    """The layers' decisions on one device: the layers of a model may be on several (`device_map`)."""
    return tuple([r if r.experts.device == device else _moved(r, device) for r in routings])


def _moved(routing: Routing, device: torch.device) -> Routing:
    return Routing(*(None if part is None else part.to(device) for part in routing))  # type: ignore[arg-type]


def count_assignments(experts: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Assignments per expert, without one-hot tensors or a host synchronisation.

    Args:
        experts: `[T, K]` int64, `num_experts` in empty slots.
        mask: `[T]` bool, False where a token does not count.

    Returns:
        `[E]` int64.
    """
    return _count(experts[None], num_experts, mask)[0]


def count_by_layer(routings: Sequence[Routing], num_experts: int, mask: Tensor | None = None) -> Tensor:
    """`count_assignments` of each layer, all at once: `[L, E]`."""
    return _count(torch.stack([routing.experts for routing in routings]), num_experts, mask)


def _count(experts: Tensor, num_experts: int, mask: Tensor | None) -> Tensor:
    """`[L, T, K]` -> `[L, E]`: one bin per layer and expert, and one for empty slots."""
    if mask is not None:
        experts = experts.masked_fill(~mask[:, None], num_experts)
    layers = experts.shape[0]
    bins = torch.arange(layers, device=experts.device)[:, None, None] * (num_experts + 1)
    flat = (experts + bins).reshape(-1)
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = torch.bincount(flat, minlength=layers * (num_experts + 1))  # 30 times as fast as scatter_add
    else:
        counts = torch.zeros(layers * (num_experts + 1), dtype=torch.int64, device=flat.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    return counts.view(layers, num_experts + 1)[:, :num_experts]


def dispatched_experts(routing: Routing, num_experts: int) -> Tensor:
    """`[T, K]` experts that really compute: the choice, with `num_experts` in empty and in dropped slots."""
    if routing.dropped is None:
        return routing.experts
    return routing.experts.masked_fill(routing.dropped, num_experts)


def gate_entropy(probs: Tensor) -> Tensor:
    """`-sum_n p_n ln p_n` in nats, `[*, C]` -> `[*]`; zero probabilities contribute zero (Fig. 4)."""
    # torch.special.entr is the same, 20 times as slow on the CPU, and its gradient at a zero probability is NaN.
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def logit_variance(logits: Tensor) -> Tensor:
    """Sample variance over experts, `[*, C]` -> `[*]`: a shift common to all experts changes no decision."""
    logits = logits.float()
    centred = logits - logits.mean(-1, keepdim=True)
    return centred.square().sum(-1) / max(
        1, logits.shape[-1] - 1
    )  # torch.var is 2.5 times as slow on the CPU


def router_stats(routings: tuple[Routing, ...], num_experts: int, mask: Tensor | None) -> RouterStats:
    """The sums of one forward pass, all layers at once. No gradient flows into them."""
    with torch.no_grad():
        counts = count_by_layer(routings, num_experts, mask)
        entropies = gate_entropy(torch.stack([r.probs for r in routings])).float()  # [L, T]
        variances = logit_variance(torch.stack([r.logits for r in routings]))  # [L, T]
        zero = torch.zeros((), dtype=torch.int64, device=counts.device)
        if any(r.dropped is not None for r in routings):
            dropped = torch.stack([zero if r.dropped is None else r.dropped.sum() for r in routings])
        else:
            dropped = zero.expand(len(routings)).clone()
        if mask is None:
            tokens = zero + routings[0].experts.shape[0]
        else:
            tokens = mask.sum()
            entropies, variances = entropies * mask, variances * mask
        seen = [r.observed for r in routings if r.observed is not None]
        observed = torch.stack(seen) if len(seen) == len(routings) else None
        return RouterStats(counts, tokens, entropies.sum(-1), dropped, variances.sum(-1), observed)
