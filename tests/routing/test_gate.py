"""The top-k gate at every option it has, token by token against its definition, outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM
from rmoe.routing import Geometry, RouterContext, RouterSpec, build_router, find, resolve, vary
from rmoe.routing.cosine import Cosine
from rmoe.routing.gate import Sigmoid, Softmax, TopK
from rmoe.routing.model_routers import SharedInSoftmax, TableTopK
from rmoe.routing.other_gates import ExpertChoice, ReLU
from rmoe.routing.router import Router
from rmoe.routing.score_routers import NoisyTopK
from rmoe.routing.scorer import EdaHead

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
    if o.group_quota:
        chosen = [n for g in members for n in sorted(g, key=lambda n: rank[n], reverse=True)[: K // o.groups]]
    if o.weights == "softmax_of_chosen":
        among = sum(torch.exp(s[n]) for n in chosen)
        weights = {n: torch.exp(s[n]) / among for n in chosen}
    else:
        weights = {n: p[n] for n in chosen}
    if o.renormalize:
        whole = sum(w**o.norm for w in weights.values()) ** (1 / o.norm)
        whole = max(whole, torch.tensor(o.eps)) if o.eps_is_floor else whole + o.eps
        weights = {n: w / whole for n, w in weights.items()}
    return {n: w / K if o.scale == "inverse_k" else o.scale * w for n, w in weights.items()}


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
        {"groups": 3, "group_quota": True},
        {"norm": 2.0, "scale": "inverse_k"},
        {"norm": 3.0, "scores": "sigmoid", "eps": 0.1},
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
    with pytest.raises(RequestError, match=r"gate\.groups is 2; allowed: at most num_experts / 2 \(1\)"):
        TopK.Config(groups=2, top_groups=2, group_score="top_2").check_geometry(Geometry(5, 2, 1))
    TopK.Config(group_score="top_2").check_geometry(Geometry(5, 1, 1))


def built(router: str, **gate: object) -> object:
    """A row with other options of its gate, built for 8 experts and k = 2."""
    return build_router(vary(resolve(router), gate=gate), Geometry(5, 8, 2, vocab_size=9))


IDENTITY = Router.Config(identity_experts=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built("moge", groups=3), r"gate\.groups is 3; allowed: a divisor of num_experts \(8\)"),
        (
            lambda: built("moge", groups=4),
            r"gate\.groups is 4; allowed: a divisor of num_experts_per_tok \(2\)",
        ),
        (lambda: built("moge", groups=1), r"gate\.group_quota is True; allowed: false without gate\.groups"),
        (lambda: built("longcat", groups=8), r"gate\.groups is 8; allowed: a divisor of num_experts \(12\)"),
        (
            lambda: built("hunyuan", layer_k=(1, 3)),
            r"gate\.layer_k is \(1, 3\); allowed: 1 to num_experts_per_tok",
        ),
        (lambda: built("hunyuan", layer_k=(0, 2)), r"gate\.layer_k is \(0, 2\); allowed: values above 0"),
        (lambda: built("hunyuan", start_k=1), r"gate\.layer_k is \(1, 2\); allowed: none with gate\.start_k"),
        (
            lambda: vary(resolve("remoe"), router=IDENTITY),
            r"router\.gate is 'relu'; allowed: top_k, softmax or sigmoid",
        ),
        (
            lambda: vary(resolve("expert-choice"), router=IDENTITY),
            r"router\.gate is 'expert_choice'; allowed: top_k",
        ),
        (
            lambda: vary(resolve("eda"), router=IDENTITY),
            r"router\.gate is 'softmax'; allowed: .* without a skip class",
        ),
        (
            lambda: NoisyTopK.Config(zero_experts=1),
            r"router\.kind is 'noisy_topk'; allowed: staged, with zero experts",
        ),
        (
            lambda: SharedInSoftmax.Config(zero_experts=1),
            r"router\.kind is 'shared_in_softmax'; allowed: staged",
        ),
        (lambda: TableTopK.Config(identity_experts=2), r"router\.kind is 'table_top_k'; allowed: staged"),
        (
            lambda: vary(resolve("adamoe"), router={"identity_experts": 1, "constant_experts": 1}),
            r"router\.identity_experts is 1; allowed: 0 with router null_experts",
        ),
        (
            lambda: RouterSpec.from_dict({"gate": {"kind": "softmax", "k": 1}}),
            r"gate\.k is 1; allowed: options of softmax: \['order', 'renormalize', 'start_k'\]",
        ),
        (
            lambda: build_router(resolve("deepseek-v4-table"), Geometry(5, 8, 2)),
            r"router\.kind is 'table_top_k'; allowed: a model that knows its token ids",
        ),
        (
            lambda: build_router(
                vary(resolve("inkling"), gate=ReLU.Config(), balance=resolve("smoe").balance), SIZES
            ),
            r"router\.gate is 'relu'; allowed: top_k, softmax or sigmoid with router shared_in_softmax",
        ),
        (
            lambda: build_router(
                vary(
                    resolve("deepseek-v4-table"), gate=ExpertChoice.Config(), balance=resolve("smoe").balance
                ),
                SIZES,
            ),
            r"router\.gate is 'expert_choice'; allowed: top_k, softmax or sigmoid with router table_top_k",
        ),
        (
            lambda: built("inkling", layer_k=(1, 2)),
            r"router\.gate is 'top_k'; allowed: a fixed k with router",
        ),
        (
            lambda: RMoEConfig(router="inkling", num_shared_experts=3),
            r"num_shared_experts is 3; allowed: 0 or 2, with router shared_in_softmax",
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


SIZES = Geometry(5, 8, 2, vocab_size=9)


def test_the_table_is_for_the_first_layers() -> None:
    """They choose by token id alone, the others by score; a bias belongs to the latter."""
    x, ids = torch.randn(6, 5), torch.tensor([3, 3, 0, 8, 3, 0])
    for layer in range(5):
        router = build_router(resolve("deepseek-v4-table"), Geometry(5, 8, 2, 5, layer, 9))
        torch.nn.init.normal_(router.scorer.linear.weight)
        routing, _ = router(x, (), None, RouterContext(1, 6, None, ids))
        by_id = [routing.experts[i].tolist() for i in (0, 1, 4)]
        assert (router.selection_bias is None) == (layer < 3)
        assert (by_id[0] == by_id[1] == by_id[2]) == (layer < 3)
        assert not torch.equal(routing.weights[0], routing.weights[1])
    other = build_router(resolve("deepseek-v4-table"), Geometry(5, 8, 2, 5, 1, 12))
    first = build_router(resolve("deepseek-v4-table"), Geometry(5, 8, 2, 5, 1, 9))
    assert torch.equal(other.table[:9], first.table)
    first.resize_vocabulary(12)
    assert torch.equal(other.table, first.table)


@pytest.mark.parametrize("router", ["hash", "deepseek-v4-table"])
def test_a_table_for_another_vocabulary_is_not_loaded(
    router: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = RMoEConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, moe_intermediate_size=8,
        router=router,
    )  # fmt: skip
    RMoEForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        RMoEForCausalLM.from_pretrained(tmp_path, vocab_size=48)


def test_zero_experts_of_a_hidden_state() -> None:
    """By hand: two experts, then identity, zero and a constant one; k = 2 of 5 classes."""
    spec = vary(
        resolve("smoe"),
        router=Router.Config(identity_experts=1, zero_experts=1, constant_experts=1),
        gate=TopK.Config(renormalize=False),
    )
    router = build_router(spec, Geometry(2, 2, 2))
    with torch.no_grad():
        router.scorer.linear.weight.copy_(torch.tensor([[0.1, -0.5], [1, -0.2], [2, 0], [0, 1], [0, 3]]))
        router.zero_experts.mixes.copy_(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
        router.zero_experts.constant_values.copy_(torch.tensor([[5.0, -1.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    routing, _ = router(x, (), None, RouterContext(1, 3))
    p = torch.softmax(x @ router.scorer.linear.weight.T, -1)
    assert [sorted(row) for row in routing.experts.tolist()] == [[1, 2], [2, 2], [0, 1]]
    a = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    passthrough = torch.tensor([p[0, 2], p[1, 4] * a[0], 0.0])
    assert torch.allclose(routing.passthrough, passthrough)
    added = torch.stack((torch.zeros(2), p[1, 4] * a[1] * torch.tensor([5.0, -1.0]), torch.zeros(2)))
    assert torch.allclose(routing.added, added)
    assert torch.allclose(routing.weights.sum(-1), torch.stack((p[0, 1], p[1, 0] * 0, p[2, 0] + p[2, 1])))


def test_a_token_that_no_expert_takes_has_probabilities_of_zero() -> None:
    gate = ReLU.Config().build(Geometry(5, 4, 2))
    logits = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [1.0, -2.0, 3.0, -3.0]])
    routing = gate(logits, None, RouterContext(1, 2))
    assert routing.probs.tolist() == [[0, 0, 0, 0], [0.25, 0, 0.75, 0]]
    assert routing.experts[0].tolist() == [4, 4, 4, 4]


def test_a_skip_class_is_in_no_group() -> None:
    grouped = Sigmoid.Config(groups=4, top_groups=2)
    with pytest.raises(RequestError, match=r"gate\.groups is 4; allowed: 1 with a skip class"):
        vary(find("eda").spec, gate=grouped)


@pytest.mark.parametrize("options", [{"group_score": "top_2"}, {"outside": "zero"}])
def test_a_bias_of_zero_changes_no_choice(options: dict[str, str]) -> None:
    """Groups are ranked by scores, also where the weights are a softmax over the chosen logits."""
    gate = TopK.Config(weights="softmax_of_chosen", groups=4, top_groups=2, **options).build(
        Geometry(4, 8, 2)
    )
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    context = RouterContext(1, 500)
    without, zero = (gate(logits, bias, context).experts for bias in (None, torch.zeros(8)))
    assert torch.equal(without, zero)


def test_scores_that_underflow_leave_finite_weights_and_gradients() -> None:
    context = RouterContext(1, 1)
    logits = torch.tensor([[1.0, 0.0, -110.0]], requires_grad=True)
    root = TopK.Config(scores="sqrt_softplus").build(Geometry(4, 3, 2))
    root(logits, None, context).weights[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    biased = TopK.Config().build(Geometry(4, 2, 1))
    chosen = biased(torch.tensor([[0.0, -110.0]]), torch.tensor([-0.6, 0.6]), context)
    assert chosen.experts.tolist() == [[1]]
    assert chosen.weights.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Cosine.Config(temperature=0.005), r"scorer\.temperature is 0\.005; allowed: 0\.01 or more"),
        (lambda: EdaHead.Config(norm_eps=-1.0), r"norm_eps"),
        (lambda: TopK.Config(layer_k=(True, 2)), r"gate\.layer_k"),
    ],
)
def test_options_that_do_nothing_or_break_are_refused(made: Callable[[], Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        made()


def test_weights_over_k_are_over_the_layers_own() -> None:
    gate = TopK.Config(scale="inverse_k", renormalize=False, layer_k=(1, 2)).build(Geometry(4, 4, 2))
    routing = gate(torch.zeros(1, 4), None, RouterContext(1, 1))
    assert routing.weights.tolist() == [[0.25, 0.0]]
