"""Competition (CompeteSMoE, 2505.13380): on some steps the experts that answer most are chosen, and teach the router.

All experts compute. An expert's affinity is the mean of `softplus` of its output; the k largest are chosen, weighted by
their share of the k, which has the sum of the gate's weights. The router's loss is the squared distance of its
probabilities from the affinities' softmax, and once more, with a weight, over the chosen; another keeps the chosen
experts' outputs apart. The form is that of the published code, its weights those of its 154M run. There one schedule
for all ranks begins after a warm-up and lets at most three layers compete on one step; here each layer, micro-batch and
rank draws by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmoe.routing.contract import Routing
from rmoe.routing.losses import masked_mean
from rmoe.routing.noise import Noise

OF_CHOSEN = 0.2
"""Weight of the router's loss over the chosen, beside that over all experts (`router_theta`)."""
DIVERSITY = 0.005
"""Weight of the outputs' similarity in the training loss."""


def drawn(rate: float, noise: Noise) -> bool:
    """Whether a layer competes in this forward pass; waits for the device."""
    return bool(noise.uniform(torch.zeros(())) < rate)


def compete(experts: Any, x: Tensor, routing: Routing, mask: Tensor | None, coefficient: float) -> Routing:
    """The decision by affinities. Its `probs` are theirs, so balance losses act on them; `logits` stay the router's.

    Args:
        experts: the layer's, with `one(n, x)`.
        x: `[T, d]`.
        routing: the router's decision, k of all `E` in each row.
        mask: `[T]` bool, False at padding.
        coefficient: weight of the router's loss.
    """
    outputs = torch.stack([experts.one(n, x) for n in range(experts.num_experts)], 1)  # [T, E, d]
    outputs = outputs.to(routing.probs.dtype)
    affinity = F.softplus(outputs).mean(-1)
    best, chosen = affinity.topk(routing.experts.shape[1], -1)
    target = affinity.softmax(-1)

    def distance(got: Tensor, want: Tensor) -> Tensor:
        return masked_mean((got - want).square().mean(-1)[None], mask)[0]

    fixed = target.detach()
    taught = distance(routing.probs, fixed)
    taught = taught + OF_CHOSEN * distance(routing.probs.gather(1, chosen), fixed.gather(1, chosen))
    units = F.normalize(outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1])), dim=-1)
    similar = (units @ units.mT - torch.diag_embed(units.square().sum(-1))).mean((-2, -1))  # [T]
    penalty = coefficient * taught + DIVERSITY * masked_mean(similar[None], mask)[0]
    # In the gate's units: its weights need not sum to one.
    weights = best / best.sum(-1, keepdim=True) * routing.weights.sum(-1, keepdim=True).detach()
    chosen_by_affinity = routing._replace(probs=target, weights=weights, experts=chosen)
    return chosen_by_affinity.with_penalty(penalty)
