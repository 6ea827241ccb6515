"""Stage 3: `gate(logits, bias, context)` -> `Routing`, Eq. 1.

`logits` `[T, C]` are at least float32, temperature already applied. `bias` `[C]` moves the selection and never the
weights; None without. In training `context.noise` is set, outside it is None. Gates that sample, or that choose no k
experts per token, are in `other_gates.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.contract import RouterContext, RouterStats, Routing
from rmoe.routing.initial import Initializer, constant
from rmoe.routing.options import Geometry, Mechanism, Options
from rmoe.routing.step_state import StepState
from rmoe.validation import NotNegative, Positive, PositiveInt, require


class Gate(StepState, Mechanism):
    """Base of all gates: logits `[T, C]` -> weights and experts `[T, K]`. Built from (options, geometry)."""

    class Config(Options):
        stage = "gate"

        @property
        def takes_bias(self) -> bool:
            """Whether a bias can move its selection."""
            return False

        @property
        def knows_zero_experts(self) -> bool:
            """Whether it can choose among experts that compute nothing as among the others."""
            return False

        @property
        def is_causal(self) -> bool:
            """Whether no token's routing depends on a later token's."""
            return True

        @property
        def leaves_empty_slots(self) -> bool:
            """False lets the experts' kernels skip the check for them."""
            return True

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__()
        self.options = options
        self.num_experts, self.top_k = geometry.num_experts, geometry.top_k
        self.register_state()

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        raise NotImplementedError


def slots_of(chosen: Tensor) -> Tensor:
    """`[T, E]` bool -> `[T, E]` int64: each expert in its own slot, `E` where it was not chosen."""
    experts = chosen.shape[-1]
    return torch.where(chosen, torch.arange(experts, device=chosen.device).expand_as(chosen), experts)


class TopK(Gate):
    """`g = scale * top_k(p) / sum`, `p` the scores of the logits: what nearly every released model has.

    The k experts are those with the largest `p + b`, or `s + b`, or the largest within the token's best groups. `b`
    moves the choice alone.

    SMoE-dropout's growing k (`start_k`): slots beyond the current k stay empty;
    `k(step) = round((k_max - k_min) * step / total) + k_min`.
    """

    class Config(Gate.Config):
        """Attributes:
        scores: `p`, of each logit.
        choose_by: what the bias is added to and the k largest are taken of.
        weights: the scores of the chosen, or a softmax over their logits.
        renormalize: divide the k weights by their sum, or by their p-norm.
        norm: p of that norm; 1 is the sum (DBRX).
        eps: of that sum: added to it, or with `eps_is_floor` its least value.
        scale: multiplies the weights (`routed_scaling_factor`); "inverse_k" divides them by k.
        expert_scale: a learned factor per expert, 1 at the start, multiplies the weights (Gemma 4, Pangu Pro MoE).
        multiplier: multiplies the logits.
        softcap: `c tanh(s / c)` of the logits, after the multiplier; None is no cap.
        groups: experts are in so many equal groups, and a token chooses within its `top_groups` best. 1 is no limit.
        group_score: of a group: its best expert's, or the sum of its two best experts'.
        outside: experts of the other groups are excluded, or have the score 0 (A.X K2): they come before chosen
            ones whose score plus bias is negative.
        group_quota: a token takes exactly `k / groups` experts of each group (MoGE); `top_groups` has no part in it.
        start_k: k grows linearly from this over training (SMoE-dropout); None holds it.
        layer_k: k of the MoE layers in turn, repeated over the depth; a layer's slots beyond its k stay empty
            (HunYuan). Empty: every layer has the model's k.
        """

        kind = "top_k"
        takes_bias = True
        knows_zero_experts = True

        scores: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
        choose_by: Literal["scores", "logits"] = "scores"
        weights: Literal["scores", "softmax_of_chosen"] = "scores"
        renormalize: bool = True
        norm: Positive = 1.0
        eps: NotNegative = 0.0
        eps_is_floor: bool = False
        scale: Positive | Literal["inverse_k"] = 1.0
        expert_scale: bool = False
        multiplier: Positive = 1.0
        softcap: Positive | None = None
        groups: PositiveInt = 1
        top_groups: PositiveInt = 1
        group_score: Literal["max", "top_2"] = "max"
        outside: Literal["excluded", "zero"] = "excluded"
        group_quota: bool = False
        start_k: PositiveInt | None = None
        layer_k: tuple[int, ...] = ()

        @property
        def leaves_empty_slots(self) -> bool:
            return self.start_k is not None or bool(self.layer_k)

        @property
        def moves(self) -> bool:
            return self.start_k is not None

        @property
        def equation(self) -> str:
            s = "s" if self.multiplier == 1 else f"{self.multiplier:g} s"
            s = s if self.softcap is None else f"{self.softcap:g} tanh({s} / {self.softcap:g})"
            p = {"softmax": f"softmax({s})", "sigmoid": f"sig({s})"}.get(self.scores, f"sqrt(softplus({s}))")
            if self.weights == "softmax_of_chosen":
                return f"g = {self._times}softmax(top_k({s}))"
            chosen = f"top_k({p})"
            if self.group_quota:
                chosen += f", k / {self.groups} of each group"
            elif self.groups > 1:
                chosen += f" in the top {self.top_groups} groups"
            total = "sum" if self.norm == 1 else f"{self.norm:g}-norm"
            chosen += f" / {total}" if self.renormalize else ""
            return f"g = {self._times}{chosen}"

        @property
        def _times(self) -> str:
            factors = ["a_n"] if self.expert_scale else []
            factors += ["1/k"] if self.scale == "inverse_k" else []
            return "".join(f"{factor} " for factor in factors)

        def check(self) -> None:
            fits = self.top_groups <= self.groups
            require(fits, "gate.top_groups", self.top_groups, f"1 to groups ({self.groups})")
            whole = all(type(k) is int and k > 0 for k in self.layer_k)
            require(whole, "gate.layer_k", self.layer_k, "values above 0")
            one = self.start_k is None or not self.layer_k
            require(one, "gate.layer_k", self.layer_k, "none with gate.start_k")
            grouped = self.groups > 1 or not self.group_quota
            require(grouped, "gate.group_quota", True, "false without gate.groups")
            fixed = self.start_k is None and not self.layer_k
            require(
                fixed or not self.group_quota, "gate.group_quota", True, "false with gate.start_k or layer_k"
            )

        def check_geometry(self, geometry: Geometry) -> None:
            experts, k = geometry.num_experts, geometry.top_k
            grows = self.start_k is None or self.start_k <= k
            require(grows, "gate.start_k", self.start_k, f"1 to num_experts_per_tok ({k})")
            fits = max(self.layer_k, default=0) <= k
            require(fits, "gate.layer_k", self.layer_k, f"1 to num_experts_per_tok ({k})")
            divides = experts % self.groups == 0
            require(divides, "gate.groups", self.groups, f"a divisor of num_experts ({experts})")
            per_group = experts // self.groups
            if self.group_quota:
                divides = k % self.groups == 0
                require(divides, "gate.groups", self.groups, f"a divisor of num_experts_per_tok ({k})")
                return
            wide = self.groups == 1 or self.group_score == "max" or per_group >= 2
            require(wide, "gate.groups", self.groups, f"at most num_experts / 2 ({experts // 2})")
            reach = self.top_groups * per_group
            require(k <= reach, "num_experts_per_tok", k, f"at most the {reach} experts of gate.top_groups")

    options: Config
    current_k: Tensor | None
    expert_scale: Tensor | None

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__(options, geometry)
        layers = options.layer_k
        self.layer_k = layers[geometry.layer_index % len(layers)] if layers else None
        start = torch.empty(self.num_experts) if options.expert_scale else None
        self.register_parameter("expert_scale", None if start is None else nn.Parameter(start))

    def initializers(self) -> dict[str, Initializer]:
        return {"expert_scale": constant(1.0)}

    def start_values(self) -> dict[str, Tensor | None]:
        start = self.options.start_k
        return {"current_k": None if start is None else torch.tensor(start)}

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        s, p = self._scores(logits)
        return self._weigh(logits, s, p, self._choose(s, p, bias), not_by_score=bias is not None)

    def given(self, logits: Tensor, experts: Tensor) -> Routing:
        """The decision where the `[T, k]` experts are chosen already: their weights follow from the logits."""
        return self._weigh(logits, *self._scores(logits), experts, not_by_score=True)

    def _weigh(self, logits: Tensor, s: Tensor, p: Tensor, experts: Tensor, not_by_score: bool) -> Routing:
        options = self.options
        k = self.layer_k if self.current_k is None else self.current_k
        unused = None if k is None else self._beyond(k, s)
        if options.weights == "softmax_of_chosen":
            chosen = s.gather(-1, experts)
            weights = F.softmax(chosen if unused is None else chosen.masked_fill(unused, -torch.inf), -1)
        else:
            weights = p.gather(-1, experts)
        if unused is not None:
            experts = torch.where(unused, self.num_experts, experts)
        may_be_empty = unused is not None or logits.shape[-1] > self.num_experts
        # A skip class, or anything else outside the experts, is an empty slot of weight zero.
        if may_be_empty:
            weights = weights.masked_fill(experts >= self.num_experts, 0.0)
        if options.renormalize:
            # Where a softmax alone chooses, the sum is never 0; sigmoids may all be, and a bias may choose others.
            may_be_zero = may_be_empty or not_by_score or options.scores == "sigmoid"
            weights = weights / self._total(weights, may_be_zero)
        if options.scale != 1:
            used = self.top_k if k is None else k
            weights = weights / used if options.scale == "inverse_k" else weights * options.scale
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[experts.clamp(max=self.num_experts - 1)]
        return Routing(logits, p if options.scores == "softmax" else shares(p), weights, experts)

    def _beyond(self, k: int | Tensor, s: Tensor) -> Tensor:
        """`[T, K]`, the slots beyond the k of this step or of this layer."""
        return torch.arange(self.top_k, device=s.device).expand(s.shape[0], -1) >= k

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`s`, the logits after multiplier and softcap, and `p`, their scores: `[T, C]` both."""
        options = self.options
        s = logits if options.multiplier == 1 else logits * options.multiplier
        if options.softcap is not None:
            s = options.softcap * torch.tanh(s / options.softcap)
        if options.scores == "softmax":
            return s, s.softmax(-1)
        if options.scores == "sigmoid":
            return s, s.sigmoid()
        # Below a logit of -87 softplus is no normal number, and at 0 the root has no gradient.
        return s, F.softplus(s).clamp(min=torch.finfo(s.dtype).tiny).sqrt()

    def _choose(self, s: Tensor, p: Tensor, bias: Tensor | None) -> Tensor:
        """`[T, k]`. Without a bias, a softmax over the chosen is of the largest logits: their own order decides."""
        options = self.options
        same_order = bias is None and options.groups == 1  # groups are ranked by sums, or beside a score of 0
        by_logits = options.choose_by == "logits" or (same_order and options.weights == "softmax_of_chosen")
        choice = s if by_logits else p
        if bias is not None:
            choice = choice.detach() + bias
        if options.group_quota:
            return self._of_each_group(choice)
        if options.groups > 1:
            choice = self._within_best_groups(choice)
        return choice.topk(self.top_k, -1).indices

    def _of_each_group(self, choice: Tensor) -> Tensor:
        """The `k / groups` best of each group."""
        groups = self.options.groups
        by_group = choice.unflatten(-1, (groups, -1))  # [T, groups, E / groups]
        best = by_group.topk(self.top_k // groups, -1).indices
        first = torch.arange(groups, device=choice.device)[:, None] * by_group.shape[-1]
        return (best + first).flatten(-2)

    def _within_best_groups(self, choice: Tensor) -> Tensor:
        """Scores outside a token's best groups become -inf or 0; ties go to the lower group, as topk has it."""
        by_group = choice.unflatten(-1, (self.options.groups, -1))  # [T, groups, E / groups]
        best_of_each = by_group.topk(1 if self.options.group_score == "max" else 2, -1).values.sum(-1)
        _, best = best_of_each.topk(self.options.top_groups, -1)
        keep = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, True)
        other = -torch.inf if self.options.outside == "excluded" else 0.0
        return by_group.masked_fill(~keep[..., None], other).flatten(-2)

    def _total(self, weights: Tensor, may_be_zero: bool) -> Tensor:
        eps, norm = self.options.eps, self.options.norm
        if norm == 1:  # no weight is negative
            total = weights.sum(-1, keepdim=True)
        else:
            total = torch.linalg.vector_norm(weights, norm, dim=-1, keepdim=True)
        if eps and not self.options.eps_is_floor:
            return total + eps
        # A token whose every weight is 0 keeps zero weights: the floor only avoids 0 / 0.
        least = max(eps, torch.finfo(total.dtype).tiny) if may_be_zero else eps
        return total.clamp(min=least) if least else total

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        if self.current_k is not None and self.options.start_k is not None:
            grown = round((self.top_k - self.options.start_k) * min(step / total_steps, 1.0))
            self.current_k.fill_(self.options.start_k + grown)


def shares(scores: Tensor) -> Tensor:
    """Scores `[T, C]`, none negative, over their sum; 0 where all of a token's are, as far-off sigmoids may be."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


class NamedTopK(TopK):
    """Base of gates that are `TopK` at some options, under a name and with options of their own."""

    class Config(Gate.Config):
        takes_bias = True
        knows_zero_experts = True

        def top_k(self) -> TopK.Config:
            """The options of `TopK` that it stands for."""
            raise NotImplementedError

        @property
        def leaves_empty_slots(self) -> bool:
            return self.top_k().leaves_empty_slots

        @property
        def moves(self) -> bool:
            return self.top_k().moves

        @property
        def equation(self) -> str:
            return self.top_k().equation

        def check(self) -> None:
            self.top_k()

        def check_geometry(self, geometry: Geometry) -> None:
            self.top_k().check_geometry(geometry)

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__(options.top_k(), geometry)


class Softmax(NamedTopK):
    """`g = softmax(G x)`, the k largest kept (Eq. 1); or fastmoe's softmax over the k largest logits."""

    class Config(NamedTopK.Config):
        """Attributes:
        order: "softmax_topk" (the paper's Eq. 1) or "topk_softmax" (fastmoe, the enwik8 runs): the weights are
            then a softmax over the k chosen logits.
        renormalize: divide the k weights by their sum (the public code does; without effect on topk_softmax).
        start_k: k grows linearly from this over training (SMoE-dropout); None holds it.
        """

        kind = "softmax"

        order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
        renormalize: bool = True
        start_k: PositiveInt | None = None

        def top_k(self) -> TopK.Config:
            weights: Literal["scores", "softmax_of_chosen"]
            weights = "scores" if self.order == "softmax_topk" else "softmax_of_chosen"
            return TopK.Config(weights=weights, renormalize=self.renormalize, start_k=self.start_k)


class Sigmoid(NamedTopK):
    """DeepSeek-V3 (2412.19437, Eq. 12 to 16; group limit of section 2.1.2): `s = sig(G x)`, top-k of `s + b`."""

    class Config(NamedTopK.Config):
        """Attributes:
        renormalize: divide the chosen scores by their sum (plus 1e-20).
        scale: multiplies the weights (`routed_scaling_factor`).
        groups: experts are in so many equal groups; a token chooses within its `top_groups` best, a group's
            score being the sum of its two best experts'. 1 is no limit.
        """

        kind = "sigmoid"

        renormalize: bool = True
        scale: Positive = 1.0
        groups: PositiveInt = 1
        top_groups: PositiveInt = 1

        def top_k(self) -> TopK.Config:
            return TopK.Config(
                scores="sigmoid", renormalize=self.renormalize, eps=1e-20, scale=self.scale,
                groups=self.groups, top_groups=self.top_groups, group_score="top_2",
            )  # fmt: skip
