"""How the routing of each transformers MoE family is read, in one table, and how that becomes a record.

Routers do not agree on what they return: the same position holds logits in one family and scores in another, and
not even one family agrees with itself from one release of transformers to the next. What they do agree on is the
call `experts(hidden, index, weights)`. So the choice is read there, where it takes effect, and the logits are the
`[T, C]` tensor among the router's results that is not handed on to the experts. Llama 4 makes no such call (every
expert runs on every token, scaled by a score that is zero for all but the chosen), so its row names positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmoe.analysis.record import RoutingRecord

_ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class Family:
    """How one family's MoE block is read.

    Attributes:
        block: name of the block's class (or of a class it derives from); it has a child `experts`, and its router
            as the child `gate` or `router`.
        score: what the family chooses by. "softmax": the full softmax of the logits. "sigmoid": independent
            sigmoids; the distribution recorded is then `s / sum(s)`.
        skip_class: the last of the C = E + 1 classes stands for "no expert" (ZAYA1). Its router hides a skip
            as expert 0 with weight exactly 0; the record shows it as E.
        scores_and_logits_at: positions of dense [T, E] scores and of the logits in the router's result, for a
            family whose experts are not told the choice (Llama 4).
        scorer: path, inside the router, of the module that holds the matrix G.
        transposed: expert matrices are [E, in, out] instead of [E, out, in].
        interleaved: gate and up projections alternate instead of standing one after the other.
    """

    block: str
    score: Literal["softmax", "sigmoid"] = "softmax"
    skip_class: bool = False
    scores_and_logits_at: tuple[int, int] | None = None
    scorer: str = ""
    transposed: bool = False
    interleaved: bool = False

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
        if self.score == "softmax":
            probs = wide.softmax(-1)
        else:
            probs = nn.functional.normalize(wide.sigmoid(), p=1.0, dim=-1)
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


FAMILIES = (
    Family("OlmoeSparseMoeBlock"),
    Family("MixtralSparseMoeBlock"),
    Family("Qwen2MoeSparseMoeBlock"),
    Family("Qwen3MoeSparseMoeBlock"),
    Family("DeepseekV2Moe"),
    Family("DeepseekV3MoE", score="sigmoid"),
    Family("GptOssMLP", transposed=True, interleaved=True),
    Family("GraniteMoeMoE"),
    Family("PhimoeSparseMoeBlock"),
    Family("JambaSparseMoeBlock"),
    Family("Llama4TextMoe", score="sigmoid", scores_and_logits_at=(0, 1), transposed=True),
    Family("ZayaSparseMoeBlock", skip_class=True, scorer="router_mlp.out_proj"),
)
FAMILY_OF_BLOCK = {family.block: family for family in FAMILIES}


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
    """The MoE layers of a transformers model, lowest first; empty if there are none of a known family."""
    layers = []
    for name, block in model.named_modules():
        bases = (base.__name__ for base in type(block).__mro__)
        family = next((FAMILY_OF_BLOCK[base] for base in bases if base in FAMILY_OF_BLOCK), None)
        if family is not None:
            children = dict(block.named_children())
            router = next(children[child] for child in _ROUTER_NAMES if child in children)
            experts: Any = children["experts"]
            top_k: Any = getattr(router, "top_k", None) or block.top_k
            layers.append(MoELayer(name, router, experts, int(experts.num_experts), int(top_k), family))
    return layers


def scorer_matrix(layer: MoELayer, shared: nn.Module | None) -> Tensor | None:
    """G, what a router compares tokens with, [C, p], detached; None for a router without such a matrix.

    Args:
        layer: whose router.
        shared: an RMoE model's shared router parameters, where some routers keep their matrix.
    """
    if layer.family is None:
        matrix = layer.router.experts_matrix(shared)  # type: ignore[operator]
        return None if matrix is None else matrix.detach()
    return layer.router.get_submodule(layer.family.scorer).weight.detach()  # type: ignore[union-attr, operator]


def expert_matrices(layer: MoELayer) -> list[Tensor] | None:
    """The matrices of all experts, each [E, hidden units, d]: gate and up (or up alone), and down.

    None where they are not stored as plain floating-point tensors (quantised checkpoints).
    """
    parameters = dict(layer.experts.named_parameters(recurse=False))
    inputs, down = parameters.get("gate_up_proj", parameters.get("up_proj")), parameters.get("down_proj")
    if inputs is None or down is None or not (inputs.is_floating_point() and down.is_floating_point()):
        return None
    first, last = inputs.detach(), down.detach()
    if layer.family is not None and layer.family.transposed:
        first = first.transpose(1, 2)  # [E, 2 I, d]
    else:
        last = last.transpose(1, 2)  # [E, I, d]
    if "gate_up_proj" not in parameters:
        return [first, last]
    if layer.family is not None and layer.family.interleaved:
        return [first[:, 0::2], first[:, 1::2], last]
    return [*first.chunk(2, dim=1), last]


@torch.no_grad()
def expert_vectors(layer: MoELayer) -> Tensor | None:
    """Per matrix the mean over hidden units, L2-normalised, joined: [E, 3 d] float32, 2 d without a gate (Fig. 5)."""
    matrices = expert_matrices(layer)
    if matrices is None:
        return None
    means = [matrix.mean(dim=1, dtype=torch.float32) for matrix in matrices]
    return torch.cat([nn.functional.normalize(mean, dim=-1) for mean in means], dim=-1)
