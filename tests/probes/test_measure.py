"""The measures against plain counts."""

from __future__ import annotations

import math

import pytest
import torch

from rmoe.probes.measure import measures
from rmoe.probes.stack import Routed

L, T, E = 2, 400, 3


def routed(gates: torch.Tensor, probs: torch.Tensor, states: torch.Tensor) -> Routed:
    nothing = torch.zeros(L)
    return Routed(
        gates,
        torch.zeros(L, T),
        nothing.sum(),
        gates[:, 0],
        *[nothing] * 3,
        probs,
        states,
        nothing,
        states[..., :0],
    )


def test_measures_equal_plain_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, E, (L, T), generator=generator)
    probs = torch.rand(L, T, E, generator=generator, dtype=torch.float64)
    # Layer 0 knows the class, under other names; layer 1 guesses.
    probs[0] = 0.01 * probs[0] + torch.nn.functional.one_hot((classes[0] + 1) % E, E)
    probs = probs / probs.sum(-1, keepdim=True)
    best = probs.topk(2, -1)
    gates = torch.zeros_like(probs).scatter(-1, best.indices, best.values)
    states = (
        torch.nn.functional.one_hot(classes, E).double() @ torch.randn(E, 5, generator=generator).double()
    )
    states[1] = torch.randn(T, 5, generator=generator)
    found = measures(routed(gates, probs, states), classes)

    assert found["accuracy"][0] == 1.0
    assert 1 / E < found["accuracy"][1] < 0.45
    assert found["decodability"] is not None
    assert found["decodability"][0] == 1.0
    assert found["decodability"][1] < 0.5
    for layer in range(L):
        first = [max(range(E), key=lambda n: float(gates[layer, t, n])) for t in range(T)]
        joint = {
            (c, n): sum(a == c and b == n for a, b in zip(classes[layer].tolist(), first, strict=True)) / T
            for c in range(E)
            for n in range(E)
        }
        information = sum(
            q * math.log(q / sum(joint[c, m] for m in range(E)) / sum(joint[d, n] for d in range(E)))
            for (c, n), q in joint.items()
            if q
        )
        assert found["mutual_information"][layer] == pytest.approx(information)
        entropy = [-sum(p * math.log(p) for p in row) for row in probs[layer].tolist()]
        assert found["entropy"][layer] == pytest.approx(sum(entropy) / T)
        outer = sorted(sum(sorted(row)[-2:]) for row in probs[layer].tolist())
        assert found["outer_balance"][layer] == pytest.approx(outer[(T - 1) // 2])
        inner = sorted(sorted(row)[-1] / sorted(row)[-2] for row in probs[layer].tolist())
        assert found["inner_balance"][layer] == pytest.approx(inner[(T - 1) // 2])
        load = [sum(float(gates[layer, t, n]) > 0 for t in range(T)) for n in range(E)]
        assert found["load"][layer] == pytest.approx(max(load) / (sum(load) / E))


def test_a_token_without_an_expert_is_nobodys() -> None:
    classes = torch.arange(T).remainder(E).expand(L, T)
    gates = torch.nn.functional.one_hot(classes, E).double()
    probs = gates.clone()
    gates[1, classes[1] == 0] = 0  # class 0 gets no expert
    found = measures(routed(gates, probs, torch.zeros(L, T, 0)), classes)
    assert found["accuracy"] == pytest.approx([1.0, 1 - float((classes[1] == 0).double().mean())])
    assert found["mutual_information"][1] == pytest.approx(
        found["mutual_information"][0]
    )  # no expert says the class, too
    gates[1] = 0
    assert measures(routed(gates, probs, torch.zeros(L, T, 0)), classes)["accuracy"][1] == 0


def test_without_a_state_nothing_is_decoded() -> None:
    classes = torch.zeros(L, T, dtype=torch.int64)
    probs = torch.full((L, T, E), 1 / E)
    assert measures(routed(probs, probs, torch.zeros(L, T, 0)), classes)["decodability"] is None


def test_an_inner_balance_ends_where_the_second_vanishes() -> None:
    probs = torch.zeros(L, T, E)
    probs[..., 0] = 1.0
    probs[1, :, 1] = 1e-6
    states = torch.zeros(L, T, 0)
    found = measures(routed(probs, probs, states), torch.zeros(L, T, dtype=torch.int64))
    assert found["inner_balance"] == pytest.approx([math.exp(30), 1e6], rel=1e-5)
    nothing = measures(routed(0 * probs, 0 * probs, states), torch.zeros(L, T, dtype=torch.int64))
    assert nothing["inner_balance"] == [0.0, 0.0]  # no expert at all
