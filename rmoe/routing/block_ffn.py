"""BlockFFN (2507.08771): a ReLU router whose outputs are normalised, and losses that make neighbours share experts.

Definitions are those of the published code (thunlp/BlockFFN, `pretrain`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmoe.routing.contract import RouterContext, Routing
from rmoe.routing.gate import Gate, slots_of
from rmoe.routing.initial import rms_norm_as_input
from rmoe.routing.losses import Loss, LossView, masked_mean, real_tokens
from rmoe.routing.options import Geometry
from rmoe.validation import NotNegative, Positive, PositiveInt


class NormedReLU(Gate):
    """`g = w * a / rms(a)`, `a = ReLU(s)`, the mean of squares over all E experts, `w` `[E]` learned from 1.

    A token asks the experts with a positive score, and how large its scores are does not count. `K` is `E`: slot `n`
    holds expert `n` or nothing. `probs` are `a` over its sum.
    """

    class Config(Gate.Config):
        """Attributes:
        eps: added to the mean of squares.
        """

        kind = "normed_relu"
        equation = "g = norm(ReLU(s))"

        eps: Positive = 1e-6

    options: Config

    def __init__(self, options: Config, geometry: Geometry) -> None:
        super().__init__(options, geometry)
        self.norm = nn.RMSNorm(geometry.num_experts, eps=options.eps)

    def forward(self, logits: Tensor, bias: Tensor | None, context: RouterContext) -> Routing:
        active = F.relu(logits)
        weights = rms_norm_as_input(active, self.norm)
        probs = active / active.sum(-1, keepdim=True).clamp(min=torch.finfo(active.dtype).tiny)
        return Routing(logits, probs, weights, slots_of(active > 0))


class ActivationLocality(Loss):
    """`mean BCE(sig(c s_{t-1}), sig(c s_t))` over the pairs of neighbouring real tokens and over experts.

    `s` are the raw scores: the sharp sigmoid tells a positive one from a negative. The later token is the target; the
    gradient flows into both.
    """

    kind = "activation_locality"

    weight: NotNegative | None = 2e-3
    sharpness: Positive = 100.0

    def __call__(self, view: LossView) -> Tensor:
        batch, length = view.context.batch, view.context.length
        scores = self.sharpness * view.logits[..., : view.num_experts].unflatten(1, (batch, length))
        before, after = scores[:, :, :-1], scores[:, :, 1:]  # [L, B, S - 1, E]
        differ = F.binary_cross_entropy_with_logits(before, after.sigmoid(), reduction="none").mean(-1)
        real = real_tokens(view).view(batch, length)
        pairs = real[:, :-1] * real[:, 1:]
        return masked_mean(differ.flatten(1), pairs.flatten())


class ChunkSparsity(Loss):
    """`1 - mean prod_t (1 - p_t)` over chunks of a sequence and experts: how likely a chunk asks an expert at all.

    `p` are the gate's `probs`. The last chunk of a sequence may be shorter; pads ask nothing. Deviations: the weight
    is constant, where the source's follows the training loss, every 100 steps from step 1,000 on; and `1 - p` is at
    least the dtype's epsilon, where the source adds 1e-5.
    """

    kind = "chunk_sparsity"

    weight: NotNegative | None = 5e-2
    chunk: PositiveInt = 64

    def __call__(self, view: LossView) -> Tensor:
        batch, length = view.context.batch, view.context.length
        real = real_tokens(view)
        short = -length % self.chunk
        p = view.probs[..., : view.num_experts] * real[:, None]
        p = F.pad(p.unflatten(1, (batch, length)), (0, 0, 0, short)).unflatten(2, (-1, self.chunk))
        most = 1 - torch.finfo(p.dtype).eps
        idle = torch.log1p(-p.clamp(max=most)).sum(3).exp()  # [L, B, chunks, E]
        present = F.pad(real.view(batch, length), (0, short)).unflatten(1, (-1, self.chunk)).any(-1)
        return masked_mean(1 - idle.mean(-1).flatten(1), present.flatten())
