"""The probes written down plainly, from docs/probes.md: every path of hidden states, one by one. Shares no code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product

Path = tuple[float, list[int | None], list[int]]  # probability, class shown per layer, class asked per layer


def paths(probe: str, classes: int, layers: int) -> Iterator[Path]:
    """Every way a token can come about."""
    n, ls = classes, range(layers)
    if probe in ("lookup", "integrate"):
        for c in range(n):
            yield 1 / n, [c] * layers, [c] * layers
    elif probe == "carry":
        for c in range(n):
            yield 1 / n, [c if l == 0 else None for l in ls], [c] * layers
    elif probe == "zipf":
        total = sum(1 / (c + 1) for c in range(n))
        for c in range(n):
            yield 1 / (c + 1) / total, [c] * layers, [c] * layers
    elif probe == "late":
        for c, start in product(range(n), ls):
            yield 1 / n / layers, [c if l >= start else None for l in ls], [c] * layers
    elif probe == "decoy":
        for seen in product(range(n), repeat=layers):
            if all(a != b for a, b in pairwise(seen)):
                yield 1 / n / (n - 1) ** (layers - 1), list(seen), list(seen)
    elif probe == "compose":
        for numbers in product(range(n), repeat=layers):
            yield n**-layers, list(numbers), [sum(numbers[: l + 1]) % n for l in ls]
    else:
        assert probe == "overwrite"
        for news in product([None, *range(n)], repeat=layers):
            if news[0] is None:
                continue
            chance, asked = 1 / n, [news[0]]
            for new in news[1:]:
                chance *= 0.65 if new is None else 0.35 / n
                asked.append(asked[-1] if new is None else new)
            yield chance, list(news), asked


def posteriors(probe: str, classes: int, evidence: list[list[float]]) -> tuple[list, list, list]:
    """Prior, posterior by this layer's cue, posterior by all cues up to it: `[L][E]` each, of one token.

    Args:
        evidence: `[L][E + 1]` log-density of a cue under each class, and under none.
    """
    layers = len(evidence)
    tables = [[[0.0] * classes for _ in range(layers)] for _ in range(3)]
    for chance, shown, asked in paths(probe, classes, layers):
        so_far = chance
        for l in range(layers):
            here = math.exp(evidence[l][classes if shown[l] is None else shown[l]])
            so_far *= here
            for table, weight in zip(tables, (chance, chance * here, so_far), strict=True):
                table[l][asked[l]] += weight
    return tuple([[w / sum(row) for w in row] for row in table] for table in tables)
