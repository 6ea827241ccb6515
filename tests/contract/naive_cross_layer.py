"""What the cross-layer routers read, written down plainly: a layer's inputs turned into what its scorer sees."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests import naive


def read(layer: Any, x: Tensor, memory: dict[str, Any], batch: int) -> Tensor:
    """`[T, d]` -> `[T, d]`. `memory` lasts over the layers."""
    router, recurrence = layer.spec["router"], layer.spec["recurrence"]
    inputs = memory.setdefault("inputs", [])
    inputs.append(x)
    if recurrence["kind"] == "previous":
        return inputs[-2] if len(inputs) > 1 else x
    if router["kind"] == "adaptive_clustering" and layer.layer:
        return _weighted(router, x, memory["best"], layer.experts)
    if router["kind"] == "multi_level_context":
        length = x.shape[0] // batch
        parts = [slice(b * length, (b + 1) * length) for b in range(batch)]
        return torch.cat([_context(layer, router, [i[part] for i in inputs]) for part in parts])
    return x


def _weighted(router: dict, x: Tensor, best: list[int], experts: int) -> Tensor:
    clusters = {n: [t for t in range(len(best)) if best[t] == n] for n in range(experts)}
    clusters = {n: tokens for n, tokens in clusters.items() if tokens}
    weights = {}
    for n, tokens in clusters.items():
        members = x.detach()[tokens]
        centre = sum(members) / len(tokens)
        deviation = sum((m - centre).abs() for m in members) / len(tokens)
        weights[n] = 1 / (deviation + router["eps"])
    top = router["cap"] * sum(float(w.sum()) for w in weights.values()) / (len(weights) * x.shape[1])
    weights = {n: w.clamp(max=top) for n, w in weights.items()}
    mean = sum(weights.values()) / len(weights)
    return torch.stack([x[t] * weights[best[t]] / mean for t in range(len(best))])


def _context(layer: Any, router: dict, inputs: list[Tensor]) -> Tensor:
    """One sequence: `inputs` are those of all layers so far, each `[S, d]`."""
    own, x = layer.own, inputs[-1]
    below = inputs[:-1][-router["depth"] :]
    rows = []
    for i in range(len(x)):
        before = range(max(0, i - router["window"]), i)
        likeness = {j: (x[i] * x[j]).sum() / math.sqrt(x.shape[1]) for j in before}
        best = sorted(before, key=lambda j: -float(likeness[j]))[: router["local_top"]]
        query = x[i]
        if best:
            shares = naive.softmax(torch.stack([likeness[j] for j in best]))
            query = query + sum(a * x[j] for a, j in zip(shares, best, strict=True))
        rows.append(_attended(own, router["heads"], query, below, i) if below else query)
    return torch.stack(rows)


def _attended(own: dict[str, Tensor], heads: int, query: Tensor, below: list[Tensor], i: int) -> Tensor:
    seen = [x[j] + own["below.distance"][m] for m, x in enumerate(below) for j in range(i + 1)]
    q = own["below.query.weight"] @ query
    keys = [own["below.key.weight"] @ s for s in seen]
    values = [own["below.value.weight"] @ s for s in seen]
    size, parts = len(q) // heads, []
    for h in range(heads):
        cut = slice(h * size, (h + 1) * size)
        shares = naive.softmax(torch.stack([(q[cut] * k[cut]).sum() / math.sqrt(size) for k in keys]))
        parts.append(sum(a * v[cut] for a, v in zip(shares, values, strict=True)))
    return own["below.out.weight"] @ torch.cat(parts)
