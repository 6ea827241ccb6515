"""Stage 3, gates where a threshold and not a number k decides: how many experts a token gets depends on the token.

`K` is `E`: slot `n` holds expert `n` or nothing.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from rmoe.routing.contract import RouterContext, RouterStats, Routing
from rmoe.routing.gate import Gate, shares, slots_of
from rmoe.routing.initial import Initializer, constant
from rmoe.routing.options import Geometry
from rmoe.validation import Share

Mass = Annotated[float, Meta(gt=0, le=1, description="above 0, at most 1")]


def quantile(values: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """The `share` quantile over the first dimension, between order statistics linearly: `[T, *]` -> `[*]`.

    As `torch.quantile`, which takes no mask and at most 16 million numbers. Without a real token it is 0.
    """
    count = torch.full((), values.shape[0], device=values.device) if mask is None else mask.sum()
    if mask is not None:
        values = values.masked_fill(~mask.view(-1, *[1] * (values.dim() - 1)), torch.inf)
    ordered = values.sort(dim=0, stable=True).values
    last = (count - 1).clamp(min=0)
    place = share * last.to(values.dtype)
    low = place.floor().long()
    at, after = (i.expand(1, *values.shape[1:]) for i in (low, torch.minimum(low + 1, last)))
    below, above = ordered.gather(0, at).squeeze(0), ordered.gather(0, after).squeeze(0)
    between = below + (place - low) * (above - below)
    return torch.where(count > 0, between, 0.0)


class TopP(Gate):
    """The fewest experts whose probabilities sum to at least `p` (2403.07652): `g = softmax(s)` of those, as it is.

    The number of experts grows with the router's doubt; a loss on the gate's entropy keeps it down.
    """

    class Config(Gate.Config):
        """Attributes:
        threshold: the mass that is enough.
        """

        kind = "top_p"
        equation = "g = softmax(s) of the fewest experts with mass p"

        threshold: Mass = 0.4

    options: Config

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        probs = F.softmax(logits, -1)
        ordered, order = torch.sort(probs.detach(), dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the first always has nothing before it
        wanted = before < self.options.threshold
        chosen = torch.zeros_like(wanted).scatter(-1, order, wanted)
        return Routing(logits, probs, probs * chosen, slots_of(chosen))


class ExpertThreshold(Gate):
    """An expert takes every token that scores it at least its threshold (Expert Threshold, 2603.11535).

    The threshold is a moving average of the batch's `1 - k / E` quantile of the expert's logits, so that it takes
    `k / E` of the tokens: expert choice, made causal. `g = sig(s)`. From the abstract and a summary: the decay and the
    start at 0; the sigmoid is ours. The source warms up with expert choice; here the first steps are on the start.
    """

    class Config(Gate.Config):
        kind = "expert_threshold"
        equation = "g = sig(s) where s >= t, t a moving average of each expert's 1 - k/E quantile"
        moves = True

        decay: Share = 0.99

    options: Config
    threshold: Tensor

    def start_values(self) -> dict[str, Tensor | None]:
        return {"threshold": torch.zeros(self.num_experts, dtype=torch.float32)}

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        scores = logits.sigmoid()
        chosen = logits.detach() >= self.threshold.to(logits.dtype)
        observed = None
        if self.training:
            with torch.no_grad():
                real = torch.full((), logits.shape[0]) if context.mask is None else context.mask.sum()
                share = 1 - self.top_k / self.num_experts
                observed = quantile(logits.detach(), share, context.mask) * real.to(logits.device)
        probs = shares(scores)
        return Routing(logits, probs, scores * chosen, slots_of(chosen), observed=observed)

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        if stats.observed is not None:
            seen = stats.observed[layer, : self.num_experts] / stats.tokens.clamp(min=1)
            step_size = 1 - self.options.decay
            self.threshold.add_(seen.to(self.threshold) - self.threshold, alpha=step_size)


class TopAny(Gate):
    """DynMoE's top-any gate (2405.14297): expert n is asked where `sig(s_n) > sig(b_n)`, `b` `[E]` learned from 0.

    The k experts that a token asks have the weight 1/k each. The gradient of `sig(s) - sig(b)` passes straight through
    the sign, for the chosen experts only; k has none. A token below every threshold asks nobody in training, and its
    best expert outside it. This is the published code (LINs-lab/DynMoE, its DeepSpeed form) with a fixed E: there, in
    training, experts that nobody asks are removed and one is added for the tokens that ask nobody. Deviation of the row
    `dynmoe`: the cosine's temperature is learned, from 1; that code holds it at 1, its Tutel form learns it from 0.1.
    """

    class Config(Gate.Config):
        kind = "top_any"
        equation = "g = 1/k where sig(s) > sig(b), b learned"

    options: Config

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__(options, geometry)
        self.threshold = nn.Parameter(torch.empty(geometry.num_experts))

    def initializers(self) -> dict[str, Initializer]:
        return {"threshold": constant(0.0)}

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        scores = logits.sigmoid()
        margin = scores - self.threshold.to(logits.dtype).sigmoid()
        chosen = margin.detach() > 0
        through = (margin - margin.detach()) * chosen  # 0, with the margin's gradient
        if not self.training:
            best = torch.zeros_like(chosen).scatter(-1, scores.argmax(-1, keepdim=True), True)
            chosen = chosen | (best & ~chosen.any(-1, keepdim=True))
        weights = (chosen + through) / chosen.sum(-1, keepdim=True).clamp(min=1)
        return Routing(logits, shares(scores), weights, slots_of(chosen))
