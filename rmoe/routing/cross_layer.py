"""Routers that look at the layers below, RMoE's published rivals: what they keep of a token differs.

MoE++ keeps its scores, ACMoE the expert it went to, pre-gated routing and MCF-MoE the inputs of the layers below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.contract import RouterContext, Routing, State
from rmoe.routing.initial import Initialized, Initializer, ProjectionFP32, normal
from rmoe.routing.options import Geometry
from rmoe.routing.recurrence import BaseRecurrence
from rmoe.routing.router import Router, SharedRouter
from rmoe.validation import Positive, PositiveInt, require

if TYPE_CHECKING:
    from rmoe.routing.spec import RouterSpec


class Previous(BaseRecurrence):
    """The scorer reads the input of the MoE layer below: Pre-gated MoE (2308.12066).

    There the layer below holds the scorer, so that experts can be fetched a layer ahead; the function is the same.
    The first layer reads its own input.
    """

    class Config(BaseRecurrence.Config):
        kind = "previous"
        equation = "f = x_{i-1}"
        carries = "x [d]"

        def features(self, geometry: Geometry) -> int:
            return geometry.hidden_size

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, state: State, shared: nn.Module | None) -> tuple[Tensor, State]:
        return (state[0] if state else hidden), (hidden,)


class GatingResidual(Router):
    """`s_1 = G_1 x; s_i = G_i x + V_i s_{i-1}`, `V_i` learned, `E x E`, no bias (MoE++, 2410.07348, Eq. 6).

    The scores accumulate: what is carried is `s_i`, not the layer's own share of it as in `ResidualScores`.
    `V` starts as the model's other weights do, which is what the released modelling code does.
    """

    class Config(Router.Config):
        kind = "gating_residual"
        equation = "s_i = G_i f_i + V_i s_{i-1}"
        carries = "scores [E]"

    options: Config

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        classes = options.scored(geometry).num_experts + spec.skips
        start = normal(geometry.initializer_range)
        self.residual = ProjectionFP32(classes, classes, start) if geometry.layer_index else None

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        below, recurrent = state[:1], state[1:]
        _, logits, recurrent = self.score(hidden, recurrent, shared, context)
        if below and self.residual is not None:
            logits = logits + self.residual(below[0])
        return self.settle(self.decide(logits, context), hidden), (logits, *recurrent)


class AdaptiveClustering(Router):
    """`s = G (M_{k*} x)`, `k*` the token's best expert one layer below (ACMoE, 2502.15315).

    `M_k = diag(m_k)`, `m_kq = 1 / (MAD_q + eps)` with the mean absolute deviation of feature q over the tokens of
    the batch whose `k*` is k; capped at ten times the mean over clusters and features, then divided, feature by
    feature, by the mean over clusters. No gradient runs through M. The first layer has M = 1.

    Which tokens share a cluster depends on the whole batch, later tokens too: not causal, as in the source.

    Deviation: clusters without a token do not enter the means; in the source they do, as `1 / eps`.
    """

    class Config(Router.Config):
        """Attributes:
        eps: of the deviation. cap: on a weight, in units of the mean weight.
        """

        kind = "adaptive_clustering"
        equation = "s_i = G_i (M_{k*} f_i), M = 1 / MAD of the tokens with the same k* = argmax p_{i-1}"
        carries = "expert [1]"
        is_causal = False
        scores_hidden = False

        eps: Positive = 1e-4
        cap: Positive = 10.0

        def check_geometry(self, geometry: Geometry) -> None:
            require(geometry.num_experts > 1, "num_experts", geometry.num_experts, "2 or more with ACMoE")

    options: Config

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        below, recurrent = state[:1], state[1:]
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if below:
            cluster = below[0].squeeze(-1).long()
            x = x * self._metric(x.detach(), cluster, context.mask)[cluster]
        _, logits, recurrent = self.score(x, recurrent, shared, context)
        routing = self.decide(logits, context)
        best = routing.probs.detach()[:, : self.num_experts].argmax(-1, keepdim=True)
        best = best.to(x.dtype)  # floating: pipelines differentiate what they carry
        return self.settle(routing, hidden), (best, *recurrent)

    def _metric(self, x: Tensor, cluster: Tensor, mask: Tensor | None) -> Tensor:
        """`[E, d]`. Sums over a cluster are matrix products: on a GPU scatters would not be reproducible."""
        experts = torch.arange(self.num_experts, device=x.device)
        member = (cluster == experts[:, None]).to(x.dtype)  # [E, T]
        if mask is not None:
            member = member * mask
        size = member.sum(-1, keepdim=True)
        present = (size > 0).to(x.dtype)
        size = size.clamp(min=1)
        centre = member @ x / size
        deviation = member @ (x - centre[cluster]).abs() / size
        weight = present / (deviation + self.options.eps)
        clusters = present.sum().clamp(min=1)
        mean = weight.sum() / (clusters * x.shape[-1])
        weight = weight.minimum(self.options.cap * mean)
        return weight / (weight.sum(0) / clusters).clamp(
            min=torch.finfo(x.dtype).tiny
        )  # 0 without a real token


class MultiLevelContext(Router):
    """MCF-MoE ("GlobalRouterGate", 2026): scores from a token's neighbours and from the layers below.

    Query: `q = W_q (x_i + sum_j a_j x_j)` over the `local_top` of the `window` tokens before i with the largest
    `x_i . x_j / sqrt(d)`, `a` their softmax. Keys and values: inputs of the `depth` MoE layers below plus a learned
    embedding of how far below, up to position i of the sequence. `z` is the heads' attention, `s = G W_o z`. The
    first layer has nothing below it: `s = G (x_i + sum_j a_j x_j)`.

    Sources: its README and the arguments of its scripts (depth 3, 8 heads, key width 64). Ours: `window`,
    `local_top`, the scale `1 / sqrt(d)`, `W_o`, and what the first layer does; no dropout.
    """

    class Config(Router.Config):
        """Attributes:
        window, local_top: how many tokens back it looks, and how many of them it takes.
        depth: MoE layers below whose inputs it keeps.
        width: of keys and values, all heads together. heads: of the attention.
        """

        kind = "multi_level_context"
        equation = "q = x + local context; z = attention(q, inputs of the layers below); s = G z"
        reads_sequence = True
        scores_hidden = False

        window: PositiveInt = 8
        local_top: PositiveInt = 4
        depth: PositiveInt = 3
        width: PositiveInt = 64
        heads: PositiveInt = 8

        @property
        def carries(self) -> str:
            return f"x [{self.depth} x d]"

        @property
        def reach(self) -> int:
            return self.depth

        def check(self) -> None:
            divides = self.width % self.heads == 0
            require(divides, "router.heads", self.heads, f"a divisor of width ({self.width})")
            fits = self.local_top <= self.window
            require(fits, "router.local_top", self.local_top, f"1 to window ({self.window})")

    options: Config

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        below = min(geometry.layer_index, options.depth)
        self.below = LayersBelow(options, geometry, below) if below else None

    def score(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Tensor, Tensor, State]:
        kept, recurrent = state[: self._kept], state[self._kept :]
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        sequences = x.view(context.batch, context.length, -1)
        real = None if context.mask is None else context.mask.view(context.batch, context.length)
        query = sequences + self._local(sequences, real)
        if self.below is not None and kept:
            memory = [layer.to(x.dtype).view_as(sequences) for layer in kept]
            query = self.below(query, memory, real)
        features, logits, recurrent = super().score(query.flatten(0, 1), recurrent, shared, context)
        return features, logits, (*kept, hidden)[-self.options.depth :] + recurrent

    @property
    def _kept(self) -> int:
        """How many parts of the state are inputs of layers below."""
        return min(self.layer_index, self.options.depth)

    def _local(self, x: Tensor, real: Tensor | None) -> Tensor:
        """`[B, S, d]` -> the softmax-weighted best of each token's `window` predecessors; 0 where there are none."""
        window, length = self.options.window, x.shape[1]
        back = F.pad(x, (0, 0, window, 0)).unfold(1, window, 1)[:, :length]  # [B, S, d, w], oldest first
        likeness = torch.einsum("bsd,bsdw->bsw", x, back) * x.shape[-1] ** -0.5
        there = torch.ones_like(x[..., 0], dtype=torch.bool) if real is None else real
        there = F.pad(there, (window, 0)).unfold(1, window, 1)[:, :length]
        best, index = likeness.masked_fill(~there, -torch.inf).topk(self.options.local_top, -1)
        weights = torch.softmax(best.masked_fill(~there.any(-1, keepdim=True), 0.0), -1)
        weights = weights * there.gather(-1, index)
        chosen = back.gather(-1, index[:, :, None].expand(-1, -1, x.shape[-1], -1))
        return torch.einsum("bsw,bsdw->bsd", weights, chosen)


class LayersBelow(Initialized):
    """Causal attention of `[B, S, d]` queries to the inputs of `count` layers below."""

    def __init__(self, options: MultiLevelContext.Config, geometry: Geometry, count: int) -> None:
        super().__init__()
        self.heads, self.init_std = options.heads, geometry.initializer_range
        size, start = geometry.hidden_size, normal(geometry.initializer_range)
        self.query = ProjectionFP32(size, options.width, start)
        self.key = ProjectionFP32(size, options.width, start)
        self.value = ProjectionFP32(size, options.width, start)
        self.out = ProjectionFP32(options.width, size, start)
        self.distance = nn.Parameter(torch.empty(count, size))

    def initializers(self) -> dict[str, Initializer]:
        return {"distance": normal(self.init_std)}

    def forward(self, query: Tensor, memory: list[Tensor], real: Tensor | None) -> Tensor:
        """Keys and values are `memory`'s `[B, S, d]`, the deepest layer first."""
        length = query.shape[1]
        marked = [x + self.distance[i].to(x.dtype) for i, x in enumerate(memory)]
        keys = torch.cat(marked, 1)  # [B, m * S, d]
        position = torch.arange(length, device=query.device)
        seen = (position[None, :] <= position[:, None])[None]  # [1, S, S]
        if real is not None:  # a pad sees itself, or it would see nothing
            seen = seen & (real[:, None] | (position[None, :] == position[:, None]))
        mask = seen.repeat(1, 1, len(memory))[:, None]
        q, k, v = self._split(self.query(query)), self._split(self.key(keys)), self._split(self.value(keys))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
