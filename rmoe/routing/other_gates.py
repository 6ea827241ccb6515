"""Stage 3, gates that sample a token's experts in training, and gates without a top-k per token."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor

from rmoe.routing.contract import RouterContext, RouterStats, Routing
from rmoe.routing.gate import Gate, slots_of
from rmoe.validation import Positive


class SecondExpert(Gate):
    """GShard (2006.16668): the best expert always, the second at random in training; both always outside it.

    Deviations of the row `gshard`: the balance loss counts both choices, the source's the first alone; experts fill up
    in token order, the source's with all first choices first.
    """

    class Config(Gate.Config):
        """Attributes:
        policy: "random": kept with probability `min(1, 2 g_2)`; "sampled": always kept, and chosen by Gumbel noise
            among the rest.
        """

        kind = "second_expert"
        equation = "g = top_2(softmax(s)), the second at random"
        uses_noise = True
        only_k = 2

        policy: Literal["random", "sampled"] = "random"

    options: Config

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        probs = F.softmax(logits, -1)
        first = probs.argmax(-1, keepdim=True)
        rest = logits.detach().scatter(-1, first, -torch.inf)
        if context.noise is not None and self.options.policy == "sampled":
            rest = rest - context.noise.exponential(rest).log()
        second = rest.argmax(-1, keepdim=True)
        experts = torch.cat((first, second), -1)
        weights = probs.gather(-1, experts)
        weights = weights / weights.sum(-1, keepdim=True)
        if context.noise is not None and self.options.policy == "random":
            kept = context.noise.uniform(weights[:, 1]) < 2 * weights[:, 1].detach()
            slot = torch.stack((torch.ones_like(kept), kept), -1)
            experts, weights = torch.where(slot, experts, self.num_experts), weights * slot
        return Routing(logits, probs, weights, experts)


class _SampledMultiplier(torch.autograd.Function):
    """SparseMixer-v2's backward: the gradient of a sampled expert's weight (2409.12136, section 3)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores, multiplier, experts, probs, heun):  # type: ignore[no-untyped-def]
        return multiplier * heun

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, multiplier, experts, probs, _ = inputs
        ctx.save_for_backward(multiplier, experts, probs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def,override]
        multiplier, experts, probs = ctx.saved_tensors
        grad = grad * multiplier
        return (-probs * grad).scatter_add(-1, experts, grad), None, None, None, None


class SparseMixer(Gate):
    """SparseMixer-v2 for k = 2 (2409.12136), the same numbers as transformers' `phimoe.sparsemixer`.

    Expert one is sampled among those within `2 jitter` of the best (the best itself outside training), expert
    two likewise among the rest; in training a weight keeps its full size if the sample was the best or with
    probability 1/4, else a third of it (Heun's third-order rule). The constants 0.3333 and 0.6667 are the source's.
    """

    class Config(Gate.Config):
        kind = "sparsemixer"
        equation = "g = sampled top_2, masked softmax"
        uses_noise = True
        leaves_empty_slots = False
        only_k = 2

        jitter: Positive = 0.01

    options: Config

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        first, weight_1 = self._pick(logits, logits, context, uniforms=1)
        rest = logits.scatter(-1, first, -torch.inf)
        second, weight_2 = self._pick(logits, rest, context, uniforms=2)
        experts, weights = torch.cat((first, second), -1), torch.cat((weight_1, weight_2), -1)
        return Routing(logits, F.softmax(logits, -1), weights, experts)

    def _pick(
        self, scores: Tensor, left: Tensor, context: RouterContext, uniforms: int
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            best, best_index = left.max(-1, keepdim=True)
            far = (best - scores) / scores.abs().clamp(min=best) > 2 * self.options.jitter
        near = left.masked_fill(far, -torch.inf)
        probs = F.softmax(near, -1)
        if context.noise is None:
            return best_index, probs.gather(-1, best_index)
        expert = (near - context.noise.exponential(near).log()).argmax(-1, keepdim=True)
        weight = probs.gather(-1, expert)
        top = probs.max(-1, keepdim=True)
        for _ in range(uniforms):  # the source draws the second expert's twice and uses the last
            draw = context.noise.uniform(top.values)
        full = (expert == top.indices) | (draw > 0.75)
        heun = torch.add(0.3333, full, alpha=0.6667).type_as(probs)
        return expert, _SampledMultiplier.apply(scores, weight, expert, probs, heun)


class ExpertChoice(Gate):
    """Each expert takes the `C = ceil(T k / E)` tokens that score it highest (2202.09368); weights as they are.

    Which tokens an expert takes depends on all tokens of the batch, later ones too: not causal. `K` is `E`: slot
    `n` holds expert `n` or nothing.
    """

    class Config(Gate.Config):
        kind = "expert_choice"
        equation = "g = top_C over tokens of softmax(s)"
        is_causal = False

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        probs = F.softmax(logits, -1)
        score, tokens = probs, torch.full((), probs.shape[0], device=probs.device)
        if context.mask is not None:  # a pad ranks behind every real token, and capacity counts real ones
            score, tokens = probs.masked_fill(~context.mask[:, None], -1.0), context.mask.sum()
        capacity = (tokens * self.top_k + self.num_experts - 1) // self.num_experts
        order = torch.argsort(score, dim=0, descending=True, stable=True)  # [T, E], best token first
        positions = torch.arange(order.shape[0], device=order.device)[:, None].expand_as(order)
        chosen = torch.empty_like(order).scatter(0, order, positions) < capacity
        return Routing(logits, probs, probs * chosen, slots_of(chosen))


MOST_L1_WEIGHT = 1e10
"""Far beyond where the loss is nothing else; unbounded, it would reach infinity where sparsity cannot be reached."""


class ReLU(Gate):
    """ReMoE (2412.14711): weights are `ReLU(logits)`, not normalised; slot `n` holds expert `n` or nothing.

    Its loss is `lambda sum_n f_n P_n` with `P_n` the mean ReLU output and `f_n` the share of tokens that use
    expert n over `k / E`; `lambda` follows the sparsity (`update`). `probs` are the outputs over their sum.

    Deviation: lambda stays within float32's least normal number and 1e10.
    """

    class Config(Gate.Config):
        """Attributes:
        start_weight: lambda at the start.
        growth: lambda is multiplied by this while sparsity is below `1 - k/E`, and divided by it above.
        """

        kind = "relu"
        equation = "g = ReLU(s)"
        moves = True

        start_weight: Positive = 1e-8
        growth: Annotated[float, Meta(gt=1, description="above 1")] = 1.2

    options: Config
    l1_weight: Tensor

    def start_values(self) -> dict[str, Tensor | None]:
        return {"l1_weight": torch.tensor(self.options.start_weight, dtype=torch.float32)}

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        weights = F.relu(logits)
        active = weights > 0
        probs = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        real = torch.ones_like(active) if context.mask is None else context.mask[:, None].expand_as(active)
        tokens = real[:, 0].sum().clamp(min=1)
        share = (active & real).to(logits.dtype).sum(0) / tokens * (self.num_experts / self.top_k)
        mean = (weights * real).sum(0) / tokens
        penalty = self.l1_weight.to(logits.dtype) * (share * mean).sum()
        return Routing(logits, probs, weights, slots_of(active), penalty=penalty)

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        """`lambda *= growth` while more than k experts are active per token, `/= growth` when fewer."""
        active = stats.counts.sum() / (stats.tokens.clamp(min=1) * stats.counts.shape[0])  # mean over layers
        moved = self.l1_weight * self.options.growth ** torch.sign(active - self.top_k).to(self.l1_weight)
        self.l1_weight.copy_(moved.clamp(torch.finfo(moved.dtype).tiny, MOST_L1_WEIGHT))
