"""What the routers of each transformers MoE family return, in one table, and how that becomes a record.

Routers do not agree on their result: the same position holds logits in one family and scores in another. What
they do agree on is the call `experts(hidden, index, weights)`, so the choice is read there, at the point
where it takes effect, and only the logits come from the router. Llama 4 makes no such call (every expert
runs on every token, scaled by a score that is zero for all but the chosen), so there the choice is read from
the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmoe.analysis.record import RoutingRecord


@dataclass(frozen=True)
class Family:
    """How one family's router is read.

    Attributes:
        router: name of the router's class (or of a class it derives from).
        logits_at: position of the raw logits in the router's result.
        score: what the family chooses by. "softmax": the full softmax of the logits. "sigmoid": independent
            sigmoids; the distribution recorded is then `s / sum(s)`.
        skip_class: the last of the C = E + 1 classes stands for "no expert" (ZAYA1). Its router hides a skip
            as expert 0 with weight exactly 0; the record shows it as E.
        scores_at: position of dense [T, E] scores in the router's result, for a family whose experts are not
            told the choice (Llama 4); None reads the choice at the experts' inputs.
        scorer: path, inside the router, of the module that holds the matrix G.
        transposed: expert matrices are [E, in, out] instead of [E, out, in].
        interleaved: gate and up projections alternate instead of standing one after the other.
        state: name of the router's argument that carries state from the layer below; None without recurrence.
    """

    router: str
    logits_at: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    skip_class: bool = False
    scores_at: int | None = None
    scorer: str = ""
    transposed: bool = False
    interleaved: bool = False
    state: str | None = None

    def record(
        self, router_output: Sequence[Any], expert_inputs: Sequence[Any], layer: MoELayer
    ) -> RoutingRecord:
        """The common record from what the router returned and what the experts were called with."""
        logits = router_output[self.logits_at].detach()
        if self.scores_at is None:
            experts, weights = (value.detach() for value in expert_inputs[1:3])
        else:
            experts = logits.topk(layer.experts_per_token, dim=-1).indices
            weights = router_output[self.scores_at].detach().gather(-1, experts)
        if self.skip_class:
            experts = experts.masked_fill((weights == 0) & (experts == 0), layer.num_experts)
        wide = logits.float()
        if self.score == "softmax":
            probs = wide.softmax(-1)
        else:
            probs = nn.functional.normalize(wide.sigmoid(), p=1.0, dim=-1)
        return RoutingRecord(logits, probs, experts, weights.float(), layer.num_experts)


FAMILIES = (
    Family("OlmoeTopKRouter"),
    Family("MixtralTopKRouter"),
    Family("Qwen2MoeTopKRouter"),
    Family("Qwen3MoeTopKRouter"),
    Family("DeepseekV2TopkRouter"),
    Family("DeepseekV3TopkRouter", score="sigmoid"),
    Family("GptOssTopKRouter", transposed=True, interleaved=True),
    Family("GraniteMoeTopKRouter"),
    Family("PhimoeTopKRouter"),
    Family("JambaTopKRouter"),
    Family("Llama4Router", logits_at=1, score="sigmoid", scores_at=0, transposed=True),
    Family("ZayaRouter", skip_class=True, scorer="router_mlp.out_proj", state="router_states"),
)
FAMILY_OF_ROUTER = {family.router: family for family in FAMILIES}


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


def family_of(module: nn.Module) -> Family | None:
    """The family whose router this module is, by its class or a class it derives from."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((FAMILY_OF_ROUTER[name] for name in names if name in FAMILY_OF_ROUTER), None)


def find_transformers_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a transformers model, lowest first; empty if there are none of a known family."""
    layers = []
    for block_name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        for child in block.children():
            family = family_of(child)
            if family is not None:
                num_experts, top_k = int(child.num_experts), int(child.top_k)  # type: ignore[arg-type]
                layers.append(MoELayer(block_name, child, experts, num_experts, top_k, family))
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
