"""Gates with thresholds and quantile balancing: what their state is made of, and that it balances."""

from __future__ import annotations

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing import BalanceSpec, Geometry, RouterContext, build_router, resolve, router_stats, vary
from rmoe.routing.gate import Softmax
from rmoe.routing.initial import fill
from rmoe.routing.losses import DiverseSimple
from rmoe.routing.threshold_gates import quantile

SIZES = Geometry(12, 8, 2, initializer_range=0.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_quantile_is_torchs(share: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, 5, dtype=torch.float64, generator=generator)
    assert (quantile(values, share) - torch.quantile(values, share, 0)).abs().max() < 1e-12
    padded = torch.cat((values, torch.randn(3, 5, dtype=torch.float64, generator=generator)))
    mask = torch.tensor([True] * rows + [False] * 3)
    assert (quantile(padded, share, mask) - torch.quantile(values, share, 0)).abs().max() < 1e-12
    assert (quantile(values, share, torch.zeros(rows, dtype=torch.bool)) == 0).all()


def tokens_and_router(name: str, skewed: float):  # type: ignore[no-untyped-def]
    """2,000 tokens with a common direction, so that an unbalanced router prefers some experts."""
    router = build_router(resolve(name), SIZES).train()
    fill(router, 0, 0.5)
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(1)) + skewed
    return router, x


def loads(router, x, step: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    routing, _ = router(x, (), None, RouterContext(1, len(x)))
    stats = router_stats((routing,), 8, None)
    router.update_all(stats, step, 100)
    return stats.counts[0] / len(x)


def test_quantile_bias_balances_within_a_few_steps() -> None:
    router, x = tokens_and_router("quantile-balance", skewed=0.7)
    first = loads(router, x, 1)
    for step in range(2, 12):
        last = loads(router, x, step)
    assert first.max() > 0.5
    assert (last - 0.25).abs().max() < 0.03


def test_quantile_bias_from_its_definition() -> None:
    router, x = tokens_and_router("quantile-balance", skewed=0.3)
    router.selection_bias.bias.copy_(torch.linspace(-1, 1, 8))
    routing, _ = router(x, (), None, RouterContext(1, len(x)))
    bar = torch.quantile(routing.logits + router.selection_bias.bias, 0.75, dim=1)
    want = -torch.quantile(routing.logits - bar[:, None], 0.75, dim=0)
    router.update_all(router_stats((routing,), 8, None), 1, 10)
    assert (router.selection_bias.bias - want).abs().max() < 1e-5


def test_thresholds_let_every_expert_take_its_share() -> None:
    router, x = tokens_and_router("expert-threshold", skewed=0.7)
    for step in range(1, 700):
        last = loads(router, x, step)
    assert (last - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("name", ["quantile-balance", "expert-threshold"])
def test_micro_batches_and_padding_add_up(name: str) -> None:
    """Two equal micro-batches move the state as their mean does; pads count nowhere; evaluation gives none."""
    router, x = tokens_and_router(name, skewed=0.3)
    parts = [router(part, (), None, RouterContext(1, 1000))[0] for part in x.split(1000)]
    total = router_stats((parts[0],), 8, None).add(router_stats((parts[1],), 8, None))
    assert torch.allclose(total.observed[0] / 2000, sum(p.observed for p in parts) / 2000)
    mask = torch.arange(2000) < 1000
    masked = router(x, (), None, RouterContext(1, 2000, mask))[0]
    assert torch.allclose(masked.observed, parts[0].observed, atol=1e-4)
    assert router.eval()(x, (), None, RouterContext(1, 2000))[0].observed is None


@pytest.mark.parametrize("name", ["quantile-balance", "expert-threshold"])
def test_recomputation_moves_nothing_twice(name: str) -> None:
    states = []
    for recompute in (False, True):
        config = RMoEConfig(
            vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, moe_intermediate_size=6,
            num_experts=8, router=name,
        )  # fmt: skip
        net = RMoEForCausalLM(config).train()
        initialize(net, 1)
        if recompute:
            net.gradient_checkpointing_enable()
        ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
        out = net(ids, labels=ids)
        out.loss.backward()
        net.update_routers(out.router_stats, 1, 10)
        states.append([b.clone() for n, b in net.named_buffers() if n.endswith(("bias", "threshold"))])
    assert any((state != 0).any() for state in states[0])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_top_p_asks_more_experts_when_in_doubt() -> None:
    router = build_router(resolve("top-p"), SIZES)
    gate = router.gate
    sure, unsure = torch.tensor([[9.0] + [0.0] * 7]), torch.zeros(1, 8)
    context = RouterContext(1, 1)
    assert (gate(sure, None, context).experts < 8).sum() == 1
    assert (gate(unsure, None, context).experts < 8).sum() == 4  # 4 / 8 >= 0.4 > 3 / 8
    everything = build_router(vary(resolve("top-p"), gate={"threshold": 1.0}), SIZES).gate
    assert (everything(unsure, None, context).experts < 8).all()


def test_top_any_by_hand() -> None:
    """Thresholds 0: positive scores pass. The third token passes none: nobody in training, its best outside it."""
    gate = build_router(resolve("dynmoe"), SIZES).gate
    with torch.no_grad():
        gate.threshold.zero_()
    logits = torch.full((3, 8), -1.0)
    logits[0, [1, 5]] = torch.tensor([0.5, 2.0])
    logits[1] = 0.1
    logits[2, 4] = -0.3
    context = RouterContext(1, 3)
    asked = {
        True: [{1: 0.5, 5: 0.5}, dict.fromkeys(range(8), 0.125), {}],
        False: [{1: 0.5, 5: 0.5}, dict.fromkeys(range(8), 0.125), {4: 1.0}],
    }
    for training, wanted in asked.items():
        routing = gate.train(training)(logits, None, context)
        for t in range(3):
            slots = zip(routing.experts[t].tolist(), routing.weights[t].tolist(), strict=True)
            assert {n: w for n, w in slots if n < 8} == wanted[t]
        assert (routing.weights[routing.experts == 8] == 0).all()


def test_top_any_learns_its_thresholds_from_the_chosen() -> None:
    """In training the weight 1/k has the gradient of `(sig(s) - sig(b)) / k`; an expert not chosen has none."""
    gate = build_router(resolve("dynmoe"), SIZES).gate.double().train()
    with torch.no_grad():
        gate.threshold.copy_(torch.linspace(-0.5, 0.5, 8))
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    logits[:5] -= 4.0  # tokens that ask nobody
    logits.requires_grad_()
    direction = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    (gate(logits, None, RouterContext(1, 50)).weights * direction).sum().backward()
    passes = logits > gate.threshold
    k = passes.sum(-1, keepdim=True)
    scores, bars = logits.sigmoid(), gate.threshold.sigmoid()
    assert (k == 0).any()
    wanted = torch.where(passes, direction * scores * (1 - scores) / k.clamp(min=1), 0.0)
    assert (logits.grad - wanted).abs().max() < 1e-12
    at_bars = torch.where(passes, direction * -bars * (1 - bars) / k.clamp(min=1), 0.0).sum(0)
    assert (gate.threshold.grad - at_bars).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": {"bias_update_rate": 1e-3}}, r"balance\.bias_update_rate is 0\.001"),
        ({"router": {"zero_experts": 2}}, r"router\.gate is 'top_any'"),
        ({"scorer": {"temperature": 0.0}}, r"scorer\.temperature is 0\.0"),
        ({"scorer": None}, r"router\.scorer is None"),
    ],
)
def test_top_any_refuses(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        vary(resolve("dynmoe"), **changes)


def test_a_loss_of_expert_vectors_refuses_a_router_without_them() -> None:
    spec = vary(resolve("hash"), balance=BalanceSpec(losses=(DiverseSimple(),)))
    config = RMoEConfig(
        vocab_size=30, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, moe_intermediate_size=6,
        num_experts=8, router=spec.to_dict(),
    )  # fmt: skip
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(
        RequestError, match=r"balance\.losses is 'diverse_simple'; allowed: losses without it"
    ):
        RMoEForCausalLM(config)(ids, labels=ids)


@pytest.mark.parametrize(
    "changes",
    [{"gate": Softmax.Config()}, {"gate": {"softcap": 3.0}}, {"balance": {"bias_update_rate": 1e-3}}],
)
def test_quantile_balance_refuses_what_it_does_not_balance(changes: dict) -> None:
    with pytest.raises(RequestError, match=r"gate|bias_update_rate"):
        build_router(vary(resolve("quantile-balance"), **changes), SIZES)


def test_a_quantile_is_of_a_k_that_stays():
    with pytest.raises(RequestError, match="allowed: top_k by plain logits, with a k that stays"):
        build_router(vary(resolve("quantile-balance"), gate={"start_k": 1}), Geometry(8, 4, 2))
