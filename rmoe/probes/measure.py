"""What a trained router does on test tokens: choice against class, gate, load, and what its state holds."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rmoe.probes.stack import Routed

RIDGE = 1e-3  # times the mean variance of a state's features
# Of the first probability: an inner balance ends at e^30, as in `rmoe analyze`.
LEAST_SECOND = math.exp(-30.0)


def measures(routed: Routed, classes: Tensor) -> dict[str, Any]:
    """Fields of one model's `ProbeRow`: a number per layer, `[L]`; `decodability` is None without a state.

    Args:
        routed: its decisions with probabilities and states, without the dimension of seeds.
        classes: `[L, T]` int64.
    """
    gates, probs = routed.gates, routed.probs
    experts = gates.shape[-1]
    used = gates != 0
    firsts = torch.where(used.any(-1), gates.argmax(-1), experts)  # a token may be without an expert
    joint = torch.stack(
        [
            torch.bincount(c * (experts + 1) + first, minlength=experts * (experts + 1)).view(experts, -1)
            for c, first in zip(classes, firsts, strict=True)
        ]
    ).double()  # [L, class, expert or none]
    joint = joint / joint.sum((1, 2), keepdim=True)
    top = probs.topk(2, -1).values
    tiny = torch.finfo(probs.dtype).tiny
    second = torch.maximum(top[..., 1], top[..., 0] * LEAST_SECOND).clamp(min=tiny)
    load = used.sum(1).double()  # [L, E]
    return {
        "accuracy": [_best_naming(table[:, :experts]) for table in joint],
        "mutual_information": _mutual_information(joint).tolist(),
        "entropy": torch.special.entr(probs).sum(-1).mean(-1).tolist(),
        "inner_balance": (top[..., 0] / second).median(-1).values.tolist(),
        "outer_balance": (probs[..., :experts] * used).sum(-1).median(-1).values.tolist(),
        "load": (load.amax(-1) / load.mean(-1).clamp(min=tiny)).tolist(),
        "decodability": _decodability(routed.states, classes, experts) if routed.states.shape[-1] else None,
    }


def _best_naming(joint: Tensor) -> float:
    """Share of tokens on the diagonal, experts named one-to-one after classes as well as can be."""
    rows, columns = linear_sum_assignment(joint.numpy(), maximize=True)
    return float(joint[rows, columns].sum())


def _mutual_information(joint: Tensor) -> Tensor:
    """`sum p(c, n) ln p(c, n) / (p(c) p(n))`, nats, `[L, E, E + 1]` -> `[L]`."""
    independent = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    ratio = torch.where(joint > 0, joint / independent.clamp(min=1e-300), 1.0)
    return (joint * ratio.log()).sum((1, 2))


def _decodability(states: Tensor, classes: Tensor, experts: int) -> list[float]:
    """Accuracy of a ridge regression from the state to the one-hot class, fitted on one half, measured on the other."""
    half = states.shape[1] // 2
    x = states.double()
    x = torch.cat((x - x[:, :half].mean(1, keepdim=True), torch.ones_like(x[..., :1])), -1)
    fit, y = x[:, :half], torch.nn.functional.one_hot(classes[:, :half], experts).double()
    gram = fit.mT @ fit
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.eye(gram.shape[-1], dtype=gram.dtype) * (RIDGE * scale)[:, None, None]
    weights = torch.linalg.solve(gram + ridge, fit.mT @ y)
    guessed = (x[:, half:] @ weights).argmax(-1)
    return (guessed == classes[:, half:]).double().mean(-1).tolist()
