"""The matrices of a routed layer: what its router compares tokens with, and its experts'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rmoe.moe.layers import RoutedLayer
from rmoe.moe.reading import is_own
from rmoe.routing.initial import Initialized


def scorer_matrix(layer: RoutedLayer, shared: Any) -> Tensor | None:
    """G, what a router compares tokens with, [C, p], detached; None for a router without such a matrix.

    Args:
        layer: whose router.
        shared: an RMoE model's shared router parameters, where some routers keep their matrix.
    """
    if is_own(layer.gate):
        matrix: Tensor | None = layer.gate.experts_matrix(shared)  # type: ignore[operator]
        return None if matrix is None else matrix.detach()
    of_graft = {
        id(parameter)
        for module in layer.gate.modules()
        if isinstance(module, Initialized)
        for parameter in module.parameters()
    }
    matrices = [
        parameter
        for parameter in layer.gate.parameters()
        if id(parameter) not in of_graft
        and parameter.dim() == 2
        and parameter.shape[0] in (layer.num_experts, layer.num_experts + 1)
    ]
    return matrices[-1].detach() if matrices else None


def expert_matrices(layer: RoutedLayer) -> list[Tensor] | None:
    """The matrices of all experts, each [E, hidden units, d]: gate and up (or up alone), and down.

    None where they are not stored as plain floating-point tensors (quantised checkpoints).
    """
    parameters = dict(layer.experts.named_parameters(recurse=False))
    inputs, down = parameters.get("gate_up_proj", parameters.get("up_proj")), parameters.get("down_proj")
    if inputs is None or down is None or not (inputs.is_floating_point() and down.is_floating_point()):
        return None
    first, last = inputs.detach(), down.detach()
    # Matrices are [E, in, out] where the first one's rows are `d`, as the last one's columns.
    if getattr(layer.experts, "is_transposed", first.shape[1] == last.shape[2]):
        first = first.transpose(1, 2)  # [E, 2 I, d]
    else:
        last = last.transpose(1, 2)  # [E, I, d]
    if "gate_up_proj" not in parameters:
        return [first, last]
    if not getattr(layer.experts, "is_concatenated", True):  # gate and up projections alternate
        return [first[:, 0::2], first[:, 1::2], last]
    return [*first.chunk(2, dim=1), last]


@torch.no_grad()
def expert_vectors(layer: RoutedLayer) -> Tensor | None:
    """Per matrix the mean over hidden units, L2-normalised, joined: [E, 3 d] float32, 2 d without a gate (Fig. 5)."""
    matrices = expert_matrices(layer)
    if matrices is None:
        return None
    # Expert by expert: a mean of all at once first makes a float32 copy of all.
    means = [torch.stack([own.mean(dim=0, dtype=torch.float32) for own in matrix]) for matrix in matrices]
    return torch.cat([nn.functional.normalize(mean, dim=-1) for mean in means], dim=-1)
