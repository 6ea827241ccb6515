"""Stage 3: `gate(logits, bias, context)` -> `Routing`, Eq. 1.

`logits` `[T, C]` are at least float32, temperature already applied. `bias` `[C]` moves the selection and never the
weights; None without. In training `context.noise` is set, outside it is None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmoe.routing import mechanisms as options
from rmoe.routing.contract import RouterContext, RouterStats, Routing
from rmoe.routing.spec import Geometry
from rmoe.routing.training_state import TrainingState


class Gate(TrainingState):
    """Base of all gates."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.num_experts, self.top_k = geometry.num_experts, geometry.top_k

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        raise NotImplementedError

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        """Move training-time state, once after optimizer step `step` (from 1) of `total_steps`."""

    def without_skipped(self, experts: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A skip class, or anything else outside the experts, becomes an empty slot of weight zero."""
        return experts, weights.masked_fill(experts >= self.num_experts, 0.0)


class Softmax(Gate):
    """`g = softmax(G x)`, the k largest kept (Eq. 1); or fastmoe's softmax over the k largest logits.

    SMoE-dropout's growing k (`start_k`): slots beyond the current k stay empty;
    `k(step) = round((k_max - k_min) * step / total) + k_min`.
    """

    current_k: Tensor | None

    def __init__(self, spec: options.Softmax, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.spec = spec
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"current_k": None if self.spec.start_k is None else torch.tensor(self.spec.start_k)}

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        probs = F.softmax(logits, -1)
        if bias is None:
            _, experts = (logits if self.spec.order == "topk_softmax" else probs).topk(self.top_k, -1)
        else:
            _, experts = (probs.detach() + bias).topk(self.top_k, -1)
        if self.spec.order == "topk_softmax":
            chosen = logits.gather(-1, experts)
            if self.current_k is not None:
                chosen = chosen.masked_fill(self._unused(logits, self.current_k), -torch.inf)
            weights = F.softmax(chosen, -1)
        else:
            weights = probs.gather(-1, experts)
        if self.current_k is not None:
            experts = torch.where(self._unused(logits, self.current_k), self.num_experts, experts)
        may_be_empty = self.current_k is not None or logits.shape[-1] > self.num_experts
        if may_be_empty:
            experts, weights = self.without_skipped(experts, weights)
        if self.spec.renormalize:
            total = weights.sum(-1, keepdim=True)
            # A token whose every slot is empty keeps zero weights: the floor only avoids 0 / 0.
            weights = weights / (total.clamp(min=torch.finfo(total.dtype).tiny) if may_be_empty else total)
        return Routing(logits, probs, weights, experts)

    def _unused(self, like: Tensor, current_k: Tensor) -> Tensor:
        return torch.arange(self.top_k, device=like.device).expand(like.shape[0], -1) >= current_k

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        if self.current_k is not None and self.spec.start_k is not None:
            grown = round((self.top_k - self.spec.start_k) * min(step / total_steps, 1.0))
            self.current_k.fill_(self.spec.start_k + grown)


class Sigmoid(Gate):
    """DeepSeek-V3 (2412.19437, Eq. 12 to 16; group limit of section 2.1.2): `s = sig(G x)`, top-k of `s + b`."""

    def __init__(self, spec: options.Sigmoid, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.spec = spec

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        scores = logits.sigmoid()
        choice = scores.detach() if bias is None else scores.detach() + bias
        if self.spec.groups > 1:
            choice = self._within_best_groups(choice)
        _, experts = choice.topk(self.top_k, -1)
        weights = scores.gather(-1, experts)
        if self.spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, scores / scores.sum(-1, keepdim=True), weights * self.spec.scale, experts)

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        """Scores outside a token's best groups become -inf; ties go to the lower group, as topk has it."""
        by_group = choice.unflatten(-1, (self.spec.groups, -1))  # [T, groups, E / groups]
        _, best = by_group.topk(2, -1).values.sum(-1).topk(self.spec.top_groups, -1)
        keep = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, True)
        return by_group.masked_fill(~keep[..., None], -torch.inf).flatten(-2)


class SecondExpert(Gate):
    """GShard (2006.16668): the best expert always, the second at random in training; both always outside it."""

    def __init__(self, spec: options.SecondExpert, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.spec = spec

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        probs = F.softmax(logits, -1)
        first = probs.argmax(-1, keepdim=True)
        rest = logits.detach().scatter(-1, first, -torch.inf)
        if context.noise is not None and self.spec.policy == "sampled":
            rest = rest - context.noise.exponential(rest).log()
        second = rest.argmax(-1, keepdim=True)
        experts = torch.cat((first, second), -1)
        weights = probs.gather(-1, experts)
        weights = weights / weights.sum(-1, keepdim=True)
        if context.noise is not None and self.spec.policy == "random":
            kept = context.noise.uniform(weights[:, 1]) < 2 * weights[:, 1].detach()
            slot = torch.stack((torch.ones_like(kept), kept), -1)
            experts, weights = torch.where(slot, experts, self.num_experts), weights * slot
        return Routing(logits, probs, weights, experts)


class ExpertChoice(Gate):
    """Each expert takes the `C = ceil(T k / E)` tokens that score it highest (2202.09368); weights as they are.

    Which tokens an expert takes depends on all tokens of the batch, later ones too: not causal. `K` is `E`: slot
    `n` holds expert `n` or nothing.
    """

    def __init__(self, spec: options.ExpertChoice, geometry: Geometry) -> None:
        super().__init__(geometry)

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        probs = F.softmax(logits, -1)
        score, tokens = probs, torch.full((), probs.shape[0], device=probs.device)
        if context.mask is not None:  # a pad ranks behind every real token, and capacity counts real ones
            score, tokens = probs.masked_fill(~context.mask[:, None], -1.0), context.mask.sum()
        capacity = (tokens * self.top_k + self.num_experts - 1) // self.num_experts
        order = torch.argsort(score, dim=0, descending=True, stable=True)  # [T, E], best token first
        positions = torch.arange(order.shape[0], device=order.device)[:, None].expand_as(order)
        chosen = torch.empty_like(order).scatter(0, order, positions) < capacity
        slots = torch.arange(self.num_experts, device=logits.device).expand_as(probs)
        return Routing(logits, probs, probs * chosen, torch.where(chosen, slots, self.num_experts))


class ReLU(Gate):
    """ReMoE (2412.14711): weights are `ReLU(logits)`, not normalised; slot `n` holds expert `n` or nothing.

    Its loss is `lambda * E sum_n f_n P_n` with `P_n` the mean ReLU output and `f_n` the share of tokens that use
    expert n over `k / E`; `lambda` follows the sparsity (`update`). `probs` are the outputs over their sum.
    """

    l1_weight: Tensor

    def __init__(self, spec: options.ReLU, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.spec = spec
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"l1_weight": torch.tensor(self.spec.start_weight, dtype=torch.float32)}

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        weights = F.relu(logits)
        active = weights > 0
        slots = torch.arange(self.num_experts, device=logits.device).expand_as(weights)
        experts = torch.where(active, slots, self.num_experts)
        probs = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        real = torch.ones_like(active) if context.mask is None else context.mask[:, None].expand_as(active)
        tokens = real[:, 0].sum().clamp(min=1)
        share = (active & real).to(logits.dtype).sum(0) / tokens * (self.num_experts / self.top_k)
        mean = (weights * real).sum(0) / tokens
        penalty = self.l1_weight.to(logits.dtype) * (share * mean).sum()
        return Routing(logits, probs, weights, experts, penalty=penalty)

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        """`lambda *= growth` while more than k experts are active per token, `/= growth` when fewer."""
        active = stats.counts.sum() / (stats.tokens.clamp(min=1) * stats.counts.shape[0])  # mean over layers
        self.l1_weight.mul_(self.spec.growth ** torch.sign(active - self.top_k).to(self.l1_weight))


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

    def __init__(self, spec: options.SparseMixer, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.jitter = spec.jitter

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
            far = (best - scores) / scores.abs().clamp(min=best) > 2 * self.jitter
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
