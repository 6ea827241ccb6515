"""RMoE written down from Eq. 1 to 6, one token and one expert at a time, in whatever dtype its inputs have.

Nothing here is shared with the package but parameter names: it is what the package is compared with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cell_step(cell: str, p: dict[str, Tensor], x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step of a cell for one token. `p` has weight_ih, weight_hh, bias_ih, bias_hh in torch's layout."""
    width = x.shape[0]

    def part(i: int, h: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(i * width, (i + 1) * width)
        return p["weight_ih"][rows] @ x + p["bias_ih"][rows], p["weight_hh"][rows] @ h + p["bias_hh"][rows]

    if cell == "gru":
        (h,) = state
        s = torch.sigmoid(sum(part(0, h)))  # type: ignore[arg-type]
        z = torch.sigmoid(sum(part(1, h)))  # type: ignore[arg-type]
        from_x, from_h = part(2, h)
        n = torch.tanh(from_x + s * from_h)
        return ((1 - z) * n + z * h,)
    if cell == "rnn":
        return (torch.tanh(sum(part(0, state[0]))),)  # type: ignore[arg-type]
    h, c = state
    i, f, g, o = (sum(part(n, h)) for n in range(4))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)  # type: ignore[arg-type]
    return torch.sigmoid(o) * torch.tanh(c), c  # type: ignore[arg-type]


def softmax(values: Tensor) -> Tensor:
    exps = [torch.exp(v - values.max().detach()) for v in values]
    return torch.stack(exps) / sum(exps)


def gate(logits: Tensor, k: int, order: str, renormalize: bool) -> tuple[list[int], list[Tensor]]:
    """Eq. 1's gate for one token."""
    chosen = sorted(range(len(logits)), key=lambda n: -float(logits[n]))[:k]
    if order == "topk_softmax":
        weights = list(softmax(torch.stack([logits[n] for n in chosen])))
    else:
        probs = softmax(logits)
        weights = [probs[n] for n in chosen]
    if renormalize:
        total = sum(weights)
        weights = [w / total for w in weights]
    return chosen, weights


def expert(x: Tensor, first: Tensor, down: Tensor, gated: bool) -> Tensor:
    inner = first @ x
    if gated:
        a, b = inner.chunk(2)
        return down @ (a / (1 + torch.exp(-a)) * b)
    return down @ torch.relu(inner)


def route_layer(
    x: Tensor, state: tuple[Tensor, ...] | None, params: dict[str, Tensor], recurrence: dict
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Eq. 4 to 6 for one token: its logits and new state. `params` has projector, scorer, cell.* of this layer."""
    projected = params["projector"] @ x
    parts = 2 if recurrence["cell"] == "lstm" else 1
    zeros = tuple(torch.zeros_like(projected) for _ in range(parts))
    if state is None or recurrence["carry"] == "zero":
        state = zeros
    elif recurrence["carry"] == "detached":
        state = tuple(s.detach() for s in state)
    cell = {name.removeprefix("cell."): v for name, v in params.items() if name.startswith("cell.")}
    state = cell_step(recurrence["cell"], cell, projected, state)
    features = state[0]
    if recurrence["normalize"]:
        features = features / torch.sqrt((features * features).mean() + 1e-5) * params["norm"]
    if recurrence["concat_hidden"]:
        features = torch.cat((x, features))
    return params["scorer"] @ features, state


def load_balance(logits: list[Tensor], chosen: list[list[int]], num_experts: int) -> Tensor:
    """`E sum_n f_n P_n` for one layer, f the share of assignments."""
    total = sum(len(c) for c in chosen)
    loss = logits[0].new_zeros(())
    for n in range(num_experts):
        f = sum(c.count(n) for c in chosen) / total
        p = sum(softmax(one)[n] for one in logits) / len(logits)
        loss = loss + num_experts * f * p
    return loss


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)
