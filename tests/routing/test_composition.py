"""Every kind of router over a recurrence that layers share: it gets its shared part and passes the state on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rmoe.errors import RequestError
from rmoe.routing import ZOO, Geometry, RouterContext, Routing, build_router, build_shared, resolve, vary
from rmoe.routing.cosine import Cosine
from rmoe.routing.describe import equation
from rmoe.routing.gate import TopK
from rmoe.routing.initial import fill
from rmoe.routing.options import Options
from rmoe.routing.router import Router
from rmoe.routing.scorer import EdaHead
from rmoe.routing.spec import RouterSpec

LAYERS, TOKENS, WIDTH, EXPERTS, VOCAB = 3, 6, 10, 4, 5
ROUTERS = {row.spec.router.kind: name for name, row in ZOO.items()}
STAGED = sorted(kind for kind, name in ROUTERS.items() if ZOO[name].spec.router.uses_scorer)


def routed(spec: RouterSpec, top_k: int, x: torch.Tensor) -> list[Routing]:
    """`[L, T, d]` through a router per layer."""
    sizes = [Geometry(WIDTH, EXPERTS, top_k, LAYERS, i, VOCAB, 0.5) for i in range(LAYERS)]
    shared = build_shared(spec, sizes[0])
    routers = nn.ModuleList(build_router(spec, size) for size in sizes).double()
    fill(routers, 3, 0.5)
    if shared is not None:
        fill(shared.double(), 3, 0.5)
    context = RouterContext(1, TOKENS, token_ids=torch.arange(TOKENS) % VOCAB)
    state, found = (), []
    for router, hidden in zip(routers, x, strict=True):
        routing, state = router(hidden, state, shared, context)
        found.append(routing)
    return found


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(LAYERS, TOKENS, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.mark.parametrize("kind", STAGED)
def test_scores_follow_from_the_layers_below(kind: str) -> None:
    """The state reaches two layers up, whatever the router adds to it. The LSTM has two parts and a shared cell."""
    row = ZOO[ROUTERS[kind]]
    spec = vary(row.spec, recurrence=resolve("rmoe-lstm").recurrence)
    x = inputs()
    logits = routed(spec, row.top_k or 2, x)[-1].logits
    reach = torch.autograd.grad(logits.sum(), x)[0].abs().sum(-1)  # [L, T]
    assert (reach > 0).all()


def test_a_gating_residual_carries_the_skip_class() -> None:
    spec = vary(resolve("moepp-residual"), scorer=EdaHead.Config(skip_class=True))
    assert routed(spec, 2, inputs())[-1].logits.shape == (TOKENS, EXPERTS + 1)


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - set(STAGED)))
def test_what_nobody_would_read_is_refused(kind: str) -> None:
    spec = ZOO[ROUTERS[kind]].spec
    with pytest.raises(
        RequestError, match=rf"router\.recurrence is 'cell'; allowed: none with router {kind}"
    ):
        vary(spec, recurrence=resolve("rmoe").recurrence)
    with pytest.raises(RequestError, match=r"router\.temperature is .*; allowed: as by default with router"):
        vary(spec, temperature={"start": 2.0})


def test_a_cluster_of_one_token_deviates_by_nothing() -> None:
    """ACMoE, by hand: MAD 0 for the lone token, so its weight is 1 / eps, here below the cap."""
    eps = 0.5
    spec = vary(resolve("acmoe"), router={"eps": eps})
    router = build_router(spec, Geometry(WIDTH, EXPERTS, 2, 2, 1, VOCAB, 0.5)).double()
    x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = router._metric(x, torch.tensor([0, 0, 0, 2]), None)  # type: ignore[operator]
    crowd = 1 / ((x[:3] - x[:3].mean(0)).abs().mean(0) + eps)
    mean = (crowd + 1 / eps) / 2
    assert (found[0] - crowd / mean).abs().max() < 1e-12
    assert (found[2] - 1 / eps / mean).abs().max() < 1e-12
    assert found[[1, 3]].eq(0).all()
    alone = router._metric(x, torch.tensor([2, 2, 2, 2]), None)  # type: ignore[operator]
    assert (alone[2] - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (TopK.Config(), "g = top_k(softmax(s)) / sum"),
        (TopK.Config(groups=4, top_groups=2), "g = top_k(softmax(s)) in the top 2 groups / sum"),
        (TopK.Config(groups=4, group_quota=True), "g = top_k(softmax(s)), k / 4 of each group / sum"),
        (resolve("xmoe").scorer, "s = cos(W f, e) / t"),
        (resolve("cosine-moe").scorer, "s = cos(f, e) / t"),
    ],
)
def test_equations_say_the_options(options: Options, said: str) -> None:
    assert options.equation == said


def test_a_cosine_is_rescaled_down_to_its_least_temperature() -> None:
    scorer = Cosine.Config(width=None, temperature=0.5).build(Geometry(WIDTH, EXPERTS, 2, 1, 0), WIDTH)
    fill(scorer, 0, 0.5)
    scorer.rescale(25.0)
    assert math.isclose(scorer.log_inverse_temperature.exp().item(), 50.0, rel_tol=1e-6)
    with pytest.raises(
        ValueError, match=r"the cosine's temperature would be 0\.0067, below its least, 0\.01"
    ):
        scorer.rescale(3.0)


def test_every_equation_can_be_said() -> None:
    """Constant experts too, which no row's summary shows."""
    for name in ZOO:
        assert equation(resolve(name))
    assert "2 experts are a_1 x + a_2 v" in Router.Config(constant_experts=2).equation


@pytest.mark.parametrize("stage", ["scorer", "gate", "recurrence"])
def test_a_stage_of_the_wrong_kind_is_refused(stage: str) -> None:
    with pytest.raises(RequestError, match=rf"router\.{stage} is .*; allowed: the options of a {stage}"):
        RouterSpec(**{stage: "rmoe"})  # type: ignore[arg-type]


def test_who_reads_the_sequence() -> None:
    """The others can stand behind a cache."""
    assert {name for name, row in ZOO.items() if row.spec.router.reads_sequence} == {"mcf-moe", "uniform"}
