"""Routers that read token ids: hash routing and StableMoE. They keep the contract and bring no three stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing import mechanisms as options
from rmoe.routing.contract import RouterContext, RouterStats, Routing, State
from rmoe.routing.initial import Initializer, ProjectionFP32, linear_fp32, normal, orthogonal
from rmoe.routing.noise import splitmix64
from rmoe.routing.router import BaseRouter, SharedRouter
from rmoe.routing.spec import Geometry, RouterSpec


def _token_ids(context: RouterContext, router: str) -> Tensor:
    if context.token_ids is None:
        raise ValueError(
            f"router {router!r} reads token ids: call the model with input_ids, not inputs_embeds"
        )
    return context.token_ids


class Hash(BaseRouter):
    """Roller et al. 2021: token id -> k fixed experts, weights 1/k. Nothing is learned.

    The table is a pure function of (table_seed, layer, token id), the k experts with the smallest hash, so every
    run and every rank has the same one. Logits are 0 for the chosen experts and -1e4 for the others, so that
    their softmax is the routing.
    """

    table: Tensor

    def __init__(self, kind: options.Hash, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(spec, geometry)
        self.table_seed = kind.table_seed
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        sizes = self.geometry
        key = splitmix64(torch.tensor(self.table_seed)) + (sizes.layer_index << 40)
        pairs = torch.arange(sizes.vocab_size * sizes.num_experts)
        scores = splitmix64(splitmix64(pairs) + key).view(sizes.vocab_size, sizes.num_experts)
        return {"table": scores.argsort(-1)[:, : sizes.top_k].contiguous()}

    def resize_vocabulary(self, vocab_size: int) -> None:
        """A token's row depends on its id alone: the old ones stay, and new ones are as if they had been there."""
        super().resize_vocabulary(vocab_size)
        device = self.table.device
        self.register_state()
        self.table = self.table.to(device)

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        experts = self.table[_token_ids(context, "hash")]  # [T, k]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        off = torch.full((experts.shape[0], self.num_experts), -1e4, dtype=dtype, device=hidden.device)
        logits = off.scatter(-1, experts, 0.0)
        weights = torch.full(experts.shape, 1 / experts.shape[1], dtype=dtype, device=hidden.device)
        return Routing(logits, F.softmax(logits, -1), weights, experts), state


class Stable(BaseRouter):
    """StableMoE (Dai et al. 2022): learn a greedy top-1 routing, distil it into token identity, freeze it.

    Stage 1 sends each token to the centroid with the largest `x . c`, with a balance loss
    `sum_n (n_n - mean) / mean * sum_{x to n} sigmoid(x . c_n)` per token, and a cross-entropy that teaches
    a router on `embedding_width`-wide word embeddings the same choice. In stage 2 that router decides, frozen.
    In both `y = a E(x) + (1 - a) x`, `a = sigmoid(x . c)`.

    Deviations: the balance loss is divided by the number of tokens, so that its weight does not depend on the
    batch; frozen means that its gradients are zero from the switch on (decoupled weight decay, if any, still acts).
    The balance weight 0.3 is from memory.
    """

    stage: Tensor

    def __init__(self, kind: options.Stable, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(spec, geometry)
        self.kind = kind
        self.centroids = nn.Parameter(torch.empty(geometry.num_experts, geometry.hidden_size))
        self.word_embeddings = nn.Parameter(torch.empty(geometry.vocab_size, kind.embedding_width))
        start = normal(kind.embedding_width**-0.5)
        self.word_router = ProjectionFP32(kind.embedding_width, geometry.num_experts, start)
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"stage": torch.tensor(1)}

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int) -> None:
        """New tokens' embeddings start as the others did."""
        super().resize_vocabulary(vocab_size)
        old = self.word_embeddings
        new = old.new_empty(vocab_size, old.shape[1])
        self.initializers()["word_embeddings"](new, None)
        kept = min(vocab_size, old.shape[0])
        new[:kept] = old[:kept]
        self.word_embeddings = nn.Parameter(new, old.requires_grad)

    def initializers(self) -> dict[str, Initializer]:
        return {"centroids": orthogonal(0.1), "word_embeddings": normal(1.0)}

    def experts_matrix(self, shared: SharedRouter | None) -> Tensor:
        return self.centroids

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        scores = linear_fp32(hidden, self.centroids)  # [T, E]
        student = self.word_router(self.word_embeddings[_token_ids(context, "stable")])
        learning = (self.stage == 1).to(scores.dtype)
        greedy = scores.argmax(-1, keepdim=True)
        experts = torch.where(self.stage == 1, greedy, student.argmax(-1, keepdim=True))
        strength = scores.gather(-1, experts).sigmoid()
        penalty = learning * self._penalty(scores, student, greedy, context.mask)
        decided = torch.where(self.stage == 1, scores, student.detach())
        return Routing(
            decided,
            F.softmax(decided, -1),
            strength,
            experts,
            passthrough=1 - strength[:, 0],
            penalty=penalty,
        ), state

    def _penalty(self, scores: Tensor, student: Tensor, greedy: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones_like(scores[:, 0]) if mask is None else mask.to(scores.dtype)
        tokens = real.sum().clamp(min=1)
        load = torch.zeros_like(scores[0]).scatter_add(0, greedy[:, 0], real)
        mean = tokens / self.num_experts
        excess = ((load - mean) / mean)[greedy[:, 0]]
        balance = (excess * scores.gather(-1, greedy)[:, 0].sigmoid() * real).sum() / tokens
        distill = (F.cross_entropy(student, greedy[:, 0], reduction="none") * real).sum() / tokens
        return self.kind.balance_weight * balance + self.kind.distill_weight * distill

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        self.stage.fill_(2 if step >= self.kind.stage1_share * total_steps else 1)
