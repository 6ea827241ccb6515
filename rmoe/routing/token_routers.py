"""Routers that read token ids: hash routing and StableMoE. They keep the contract and bring no three stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from rmoe.routing.contract import RouterContext, RouterStats, Routing, State
from rmoe.routing.fixed_routers import fixed
from rmoe.routing.initial import Initializer, ProjectionFP32, linear_fp32, normal, orthogonal
from rmoe.routing.noise import splitmix64
from rmoe.routing.options import Geometry
from rmoe.routing.router import BaseRouter, SharedRouter
from rmoe.validation import Finite, NotNegativeInt, PositiveInt

if TYPE_CHECKING:
    from rmoe.routing.spec import RouterSpec


class TokenRouter(BaseRouter):
    """Base of routers that read token ids and have neither scorer nor gate."""

    class Config(BaseRouter.Config):
        uses_scorer = False
        uses_gate = False
        needs_token_ids = True


def token_ids(context: RouterContext, router: str) -> Tensor:
    """`[T]`, the token ids.

    Raises:
        ValueError: the model was given embeddings.
    """
    if context.token_ids is None:
        raise ValueError(
            f"router {router!r} reads token ids: call the model with input_ids, not inputs_embeds"
        )
    return context.token_ids


def expert_table(seed: int, sizes: Geometry) -> Tensor:
    """`[V, k]` int64: of each token id the k experts with the smallest hash of (seed, layer, id, expert)."""
    key = splitmix64(torch.tensor(seed)) + (sizes.layer_index << 40)
    pairs = torch.arange(sizes.vocab_size * sizes.num_experts)
    scores = splitmix64(splitmix64(pairs) + key).view(sizes.vocab_size, sizes.num_experts)
    return scores.argsort(-1)[:, : sizes.top_k].contiguous()


class Hash(TokenRouter):
    """Roller et al. 2021: token id -> k fixed experts, weights 1/k. Nothing is learned.

    The table is a pure function of (table_seed, layer, token id), the k experts with the smallest hash, so every
    run and every rank has the same one.
    """

    class Config(TokenRouter.Config):
        kind = "hash"
        equation = "n = table[token]"

        table_seed: NotNegativeInt = 0

    options: Config
    table: Tensor

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"table": expert_table(self.options.table_seed, self.geometry)}

    def resize_vocabulary(self, vocab_size: int) -> None:
        """A token's row depends on its id alone: the old ones stay, and new ones are as if they had been there."""
        super().resize_vocabulary(vocab_size)
        device = self.table.device
        self.register_state()
        self.table = self.table.to(device)

    def route(
        self, hidden: Tensor, state: State, shared: SharedRouter | None, context: RouterContext
    ) -> tuple[Routing, State]:
        experts = self.table[token_ids(context, "hash")]  # [T, k]
        return fixed(hidden, experts, 1 / experts.shape[1], self.num_experts), state


class Stable(TokenRouter):
    """StableMoE (Dai et al. 2022): learn a greedy top-1 routing, distil it into token identity, freeze it.

    Stage 1 sends each token to the centroid with the largest `x . c`, with a balance loss
    `sum_n (n_n - mean) / mean * sum_{x to n} sigmoid(x . c_n)` per token, and a cross-entropy that teaches
    a router on `embedding_width`-wide word embeddings the same choice. In stage 2 that router decides, frozen.
    In both `y = a E(x) + (1 - a) x`, `a = sigmoid(x . c)`.

    Deviations: the balance loss is divided by the number of tokens, so that its weight does not depend on the
    batch; frozen means that its gradients are zero from the switch on (decoupled weight decay, if any, still acts).
    The balance weight 0.3 is from memory.
    """

    class Config(TokenRouter.Config):
        """Attributes:
        stage1_share: share of training after which the distilled router takes over, frozen.
        embedding_width: of the distilled router's word embeddings.
        balance_weight, distill_weight: of the two losses of stage 1.
        """

        kind = "stable"
        equation = "y = a E(x) + (1 - a) x, a = sig(x . c)"
        moves = True
        only_k = 1

        stage1_share: Annotated[float, Meta(gt=0, lt=1, description="above 0, below 1")] = 0.1
        embedding_width: PositiveInt = 50
        balance_weight: Finite = 0.3
        distill_weight: Finite = 1.0

    options: Config
    stage: Tensor

    def __init__(self, options: Config, spec: RouterSpec, geometry: Geometry) -> None:
        super().__init__(options, spec, geometry)
        self.centroids = nn.Parameter(torch.empty(geometry.num_experts, geometry.hidden_size))
        self.word_embeddings = nn.Parameter(torch.empty(geometry.vocab_size, options.embedding_width))
        start = normal(options.embedding_width**-0.5)
        self.word_router = ProjectionFP32(options.embedding_width, geometry.num_experts, start)
        self.register_state()

    def start_values(self) -> dict[str, Tensor | None]:
        return {"stage": torch.tensor(1)}

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int) -> None:
        """New tokens' embeddings start as the others did."""
        super().resize_vocabulary(vocab_size)
        old = self.word_embeddings
        if vocab_size == old.shape[0]:
            return  # an optimizer may have it
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
        student = self.word_router(self.word_embeddings[token_ids(context, "stable")])
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
        return self.options.balance_weight * balance + self.options.distill_weight * distill

    @torch.no_grad()
    def update(self, layer: int, stats: RouterStats, step: int, total_steps: int) -> None:
        self.stage.fill_(2 if step >= self.options.stage1_share * total_steps else 1)
