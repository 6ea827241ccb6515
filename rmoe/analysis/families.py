"""How the routing of any transformers MoE is read by looking at it, and how that becomes a record.

Routers do not agree on what they return: the same position holds logits in one family and scores in another, and
not even one family agrees with itself from one release of transformers to the next. What they do agree on is the
call `experts(hidden, index, weights)`. So the choice is read there, where it takes effect; the logits are the
`[T, E]` tensor among the router's results that is not handed on to the experts; and what the family chooses by is
that function of the logits which gives the weights. Three families are exceptions, each a row of `EXCEPTIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmoe.analysis.record import RoutingRecord
from rmoe.errors import RequestError
from rmoe.graft.discover import GATE_NAMES

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrt_softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
    "probabilities": lambda logits: logits,  # of routers that return them where others return logits
}
"""What families choose by: name -> the scores of all experts, from what the router returns."""

TOLERANCE = 0.02
"""Of ratios between a token's weights and between its scores: bfloat16 rounds each to 0.4%."""


@dataclass(frozen=True)
class Family:
    """How one family's MoE block is read.

    Attributes:
        score: what the family chooses by, a key of `SCORES`; the distribution recorded is `s / sum(s)`. None: found
            out from the weights.
        skip_class: the last of the C = E + 1 classes stands for "no expert" (ZAYA1). Its router hides a skip
            as expert 0 with weight exactly 0; the record shows it as E.
        scores_and_logits_at: positions of dense [T, E] scores and of the logits in the router's result, for a
            family whose experts are not told the choice (Llama 4).
    """

    score: Literal["softmax", "sigmoid"] | None = None
    skip_class: bool = False
    scores_and_logits_at: tuple[int, int] | None = None

    def record(
        self, router_output: Tensor | Sequence[Any], expert_inputs: Sequence[Any], layer: MoELayer
    ) -> RoutingRecord:
        """The common record of T tokens.

        Args:
            router_output: what the router returned.
            expert_inputs: the hidden states, expert indices and weights that the experts were called with.
            layer: the layer they belong to.
        """
        if self.scores_and_logits_at is None:
            experts, weights = expert_inputs[1:3]
            logits = self._logits(router_output, weights, layer)
        else:
            scores, logits = (router_output[position] for position in self.scores_and_logits_at)
            experts = logits.topk(layer.experts_per_token, dim=-1).indices
            weights = scores.gather(-1, experts)
        experts, weights, logits = experts.detach(), weights.detach().float(), logits.detach()
        if self.skip_class:
            experts = experts.masked_fill((weights == 0) & (experts == 0), layer.num_experts)
        wide = logits.float()
        scores = SCORES[self.score or _score_of(wide, experts, weights, layer)](wide)
        probs = scores / scores.sum(-1, keepdim=True)
        return RoutingRecord(logits, probs, experts, weights, layer.num_experts)

    def _logits(self, router_output: Tensor | Sequence[Any], weights: Tensor, layer: MoELayer) -> Tensor:
        """The router's one [T, C] floating-point result that is not the experts' weights."""
        shape = (len(weights), layer.num_experts + self.skip_class)
        results = [router_output] if isinstance(router_output, Tensor) else router_output
        found = [
            value
            for value in results
            if isinstance(value, Tensor)
            and value.shape == shape
            and value.is_floating_point()
            and value is not weights
        ]
        if len(found) != 1:
            raise RuntimeError(f"{layer.name}: {len(found)} of the router's results look like logits {shape}")
        return found[0]


def _score_of(logits: Tensor, experts: Tensor, weights: Tensor, layer: MoELayer) -> str:
    """Which function of the logits the weights are proportional to, token by token.

    Raises:
        RequestError: none of `SCORES`.
    """
    chosen, weights = experts[:256], weights[:256]
    errors = {}
    for name, function in SCORES.items():
        scores = function(logits[:256]).gather(-1, chosen)
        errors[name] = _disproportion(weights, scores)
    best = min(errors, key=errors.__getitem__)
    if not errors[best] <= TOLERANCE:
        allowed = f"a router whose weights follow from its scores by one of {', '.join(SCORES)}"
        raise RequestError(
            "MODEL", type(layer.router).__name__, f"{allowed}; the nearest is off by {errors[best]:.2g}"
        )
    return best


def _disproportion(weights: Tensor, scores: Tensor) -> float:
    """How far a token's weights are from its scores, both over their sums (as they are, where there is one choice)."""
    if weights.shape[-1] > 1:
        weights, scores = (part / part.sum(-1, keepdim=True) for part in (weights, scores))
    error = (weights - scores).abs() / scores.abs().clamp(min=torch.finfo(scores.dtype).tiny)
    return float(error.nan_to_num(torch.inf).max())


ORDINARY = Family()
EXCEPTIONS = {
    # Weights are probabilities of a masked softmax, each expert's with another mask (SparseMixer).
    "PhimoeSparseMoeBlock": Family(score="softmax"),
    # Every expert runs on every token, scaled by a score that is zero for all but the chosen.
    "Llama4TextMoe": Family(score="sigmoid", scores_and_logits_at=(0, 1)),
    "ZayaSparseMoeBlock": Family(score="softmax", skip_class=True),
}
"""Class name of a block (or of a class it derives from) -> how it is read."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        name: of the MoE block, as in the model.
        router: its router.
        experts: the module with the stacked expert matrices.
        num_experts, experts_per_token: E, k.
        family: how its router is read; None for a layer of an RMoE model, which returns its routing itself.
    """

    name: str
    router: nn.Module
    experts: nn.Module
    num_experts: int
    experts_per_token: int
    family: Family | None


def find_transformers_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a transformers model, lowest first: blocks with a router beside experts. Empty without any."""
    layers = []
    for name, block in model.named_modules():
        children = dict(block.named_children())
        router = next((children[child] for child in GATE_NAMES if child in children), None)
        experts = children.get("experts")
        if router is None or experts is None:
            continue
        bases = (base.__name__ for base in type(block).__mro__)
        family = next((EXCEPTIONS[base] for base in bases if base in EXCEPTIONS), ORDINARY)
        owners = (experts, router, block, getattr(model, "config", None))
        num_experts, top_k = (_size(n, owners, type(block).__name__) for n in (_NUM_EXPERTS, _TOP_K))
        layers.append(MoELayer(name, router, experts, num_experts, top_k, family))
    return layers


_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")


def _size(names: tuple[str, ...], owners: tuple[Any, ...], block: str) -> int:
    """The first integer of one of these names that experts, router, block or configuration have."""
    for owner in owners:
        for name in names:
            if type(value := getattr(owner, name, None)) is int:
                return value
    raise RequestError("MODEL", block, f"a MoE block that says its {names[0]}")


def scorer_matrix(layer: MoELayer, shared: nn.Module | None) -> Tensor | None:
    """G, what a router compares tokens with, [C, p], detached; None for a router without such a matrix.

    Args:
        layer: whose router.
        shared: an RMoE model's shared router parameters, where some routers keep their matrix.
    """
    if layer.family is None:
        matrix = layer.router.experts_matrix(shared)  # type: ignore[operator]
        return None if matrix is None else matrix.detach()
    classes = layer.num_experts + layer.family.skip_class
    matrices = [p for p in layer.router.parameters() if p.dim() == 2 and p.shape[0] == classes]
    return matrices[-1].detach() if matrices else None


def expert_matrices(layer: MoELayer) -> list[Tensor] | None:
    """The matrices of all experts, each [E, hidden units, d]: gate and up (or up alone), and down.

    None where they are not stored as plain floating-point tensors (quantised checkpoints).
    """
    parameters = dict(layer.experts.named_parameters(recurse=False))
    inputs, down = parameters.get("gate_up_proj", parameters.get("up_proj")), parameters.get("down_proj")
    if inputs is None or down is None or not (inputs.is_floating_point() and down.is_floating_point()):
        return None
    first, last = inputs.detach(), down.detach()
    if getattr(layer.experts, "is_transposed", _is_transposed(last, first)):
        first = first.transpose(1, 2)  # [E, 2 I, d]
    else:
        last = last.transpose(1, 2)  # [E, I, d]
    if "gate_up_proj" not in parameters:
        return [first, last]
    if not getattr(layer.experts, "is_concatenated", True):  # gate and up projections alternate
        return [first[:, 0::2], first[:, 1::2], last]
    return [*first.chunk(2, dim=1), last]


def _is_transposed(down: Tensor, first: Tensor) -> bool:
    """Whether matrices are [E, in, out]: the first one's rows are then `d`, as the last one's columns."""
    return first.shape[1] == down.shape[2]


@torch.no_grad()
def expert_vectors(layer: MoELayer) -> Tensor | None:
    """Per matrix the mean over hidden units, L2-normalised, joined: [E, 3 d] float32, 2 d without a gate (Fig. 5)."""
    matrices = expert_matrices(layer)
    if matrices is None:
        return None
    means = [matrix.mean(dim=1, dtype=torch.float32) for matrix in matrices]
    return torch.cat([nn.functional.normalize(mean, dim=-1) for mean in means], dim=-1)
