"""The top-k gate at every option it has, token by token against its definition, outputs and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.routing import Geometry, RouterContext
from rmoe.routing.gate import Sigmoid, Softmax, TopK

TOKENS, EXPERTS, K = 17, 12, 3
BIAS = torch.linspace(-0.4, 0.4, EXPERTS, dtype=torch.float64)


def naive(o: TopK.Config, logits: list[Tensor], bias: Tensor | None) -> dict[int, Tensor]:
    """One token: expert -> weight."""
    s = [o.multiplier * x for x in logits]
    if o.softcap is not None:
        s = [o.softcap * torch.tanh(x / o.softcap) for x in s]
    total = sum(torch.exp(x) for x in s)
    p = {
        "softmax": [torch.exp(x) / total for x in s],
        "sigmoid": [1 / (1 + torch.exp(-x)) for x in s],
        "sqrt_softplus": [torch.sqrt(torch.log(1 + torch.exp(x))) for x in s],
    }[o.scores]
    by_logits = o.choose_by == "logits"
    rank = [
        float(v.detach()) + (float(bias[n]) if bias is not None else 0)
        for n, v in enumerate(s if by_logits else p)
    ]
    width = len(s) // o.groups
    members = [range(g * width, (g + 1) * width) for g in range(o.groups)]
    best = 1 if o.group_score == "max" else 2

    def score(group: range) -> float:
        return sum(sorted((rank[n] for n in group), reverse=True)[:best])

    allowed = [n for group in sorted(members, key=score, reverse=True)[: o.top_groups] for n in group]
    chosen = sorted(allowed, key=lambda n: rank[n], reverse=True)[:K]
    if o.weights == "softmax_of_chosen":
        among = sum(torch.exp(s[n]) for n in chosen)
        weights = {n: torch.exp(s[n]) / among for n in chosen}
    else:
        weights = {n: p[n] for n in chosen}
    if o.renormalize:
        whole = sum(weights.values())
        whole = max(whole, torch.tensor(o.eps)) if o.eps_is_floor else whole + o.eps
        weights = {n: w / whole for n, w in weights.items()}
    return {n: o.scale * w for n, w in weights.items()}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "scores": "sigmoid",
            "eps": 0.01,
            "scale": 2.5,
            "groups": 4,
            "top_groups": 2,
            "group_score": "top_2",
        },
        {"scores": "sqrt_softplus", "scale": 1.5},
        {"scores": "sigmoid", "choose_by": "logits", "renormalize": False},
        {"groups": 3, "top_groups": 2, "renormalize": False, "scale": 16.0},
        {"groups": 4, "top_groups": 1},
        {"softcap": 0.7, "multiplier": 3.0},
        {"scores": "sigmoid", "eps": 2.5, "eps_is_floor": True},
        {"weights": "softmax_of_chosen", "choose_by": "logits", "renormalize": False, "softcap": 2.0},
    ],
)
def test_top_k_equals_its_definition(options: dict, biased: bool) -> None:
    config = TopK.Config(**options)
    gate = config.build(Geometry(5, EXPERTS, K))
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits.requires_grad_()
    bias = BIAS if biased else None
    routing = gate(logits, bias, RouterContext(1, TOKENS))
    want = [naive(config, list(row), bias) for row in logits]
    for experts, weights, token in zip(routing.experts.tolist(), routing.weights, want, strict=True):
        assert set(experts) == set(token)
        for n, weight in zip(experts, weights, strict=True):
            assert abs(float((weight - token[n]).detach())) < 1e-12
    assert (routing.probs.sum(-1) - 1).abs().max() < 1e-12
    direction = torch.randn(EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    got = torch.autograd.grad((routing.weights * direction[routing.experts]).sum(), logits)[0]
    value = sum(weight * direction[n] for token in want for n, weight in token.items())
    assert (got - torch.autograd.grad(value, logits)[0]).abs().max() < 1e-12


def test_a_skip_class_takes_no_weight() -> None:
    """One class more than experts: its slot is empty, whatever the scores are."""
    for scores in ("softmax", "sigmoid"):
        gate = TopK.Config(scores=scores).build(Geometry(5, 4, 2))  # type: ignore[arg-type]
        logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0], [5.0, 4.0, 0.0, 0.0, -9.0]])
        routing = gate(logits, None, RouterContext(1, 2))
        assert routing.experts.tolist() == [[4, 3], [0, 1]]
        assert float(routing.weights[0, 0]) == 0.0
        assert math.isclose(float(routing.weights[0].sum()), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        (Softmax.Config(), TopK.Config()),
        (
            Softmax.Config(order="topk_softmax", renormalize=False, start_k=2),
            TopK.Config(weights="softmax_of_chosen", renormalize=False, start_k=2),
        ),
        (
            Sigmoid.Config(scale=2.5, groups=4, top_groups=2),
            TopK.Config(scores="sigmoid", eps=1e-20, scale=2.5, groups=4, top_groups=2, group_score="top_2"),
        ),
    ],
)
def test_named_gates_are_top_k_at_some_options(named: Softmax.Config, options: TopK.Config) -> None:
    assert named.build(Geometry(5, EXPERTS, K)).options == options
    assert (named.equation, named.moves) == (options.equation, options.moves)
    assert named.leaves_empty_slots == options.leaves_empty_slots


def test_a_group_of_one_expert_has_a_best_but_no_two_best() -> None:
    sizes = Geometry(5, 4, 2)
    TopK.Config(groups=4, top_groups=2).check_geometry(sizes)
    with pytest.raises(RequestError, match=r"gate\.groups is 4; allowed: at most num_experts / 2 \(2\)"):
        TopK.Config(groups=4, top_groups=2, group_score="top_2").check_geometry(sizes)
