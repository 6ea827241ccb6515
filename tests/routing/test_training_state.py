"""Biases, schedules and noise: counted once, saved, in float32, and never touched by a forward pass."""

from __future__ import annotations

import math

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing import (
    BalanceSpec,
    Geometry,
    RouterContext,
    RouterSpec,
    RouterStats,
    build_router,
    resolve,
    router_stats,
    vary,
)
from rmoe.routing.gate import Softmax
from rmoe.routing.losses import LoadBalance
from rmoe.routing.noise import Noise
from rmoe.routing.router import Router
from rmoe.routing.scorer import MLP
from rmoe.routing.temperature import Temperature
from tests.model.small import model, tokens

SIZES = Geometry(12, 4, 2, num_layers=1, vocab_size=30)


def stats(counts: list[int], tokens_: int = 10, entropy: float = 5.0) -> RouterStats:
    as_tensor = torch.tensor([counts])
    return RouterStats(
        as_tensor, torch.tensor(tokens_), torch.tensor([entropy]), torch.tensor([0]), torch.tensor([1.0])
    )


def test_bias_moves_towards_the_mean_load() -> None:
    router = build_router(resolve("smoe-bias"), SIZES)
    router.update_all(stats([8, 2, 5, 5]), 1, 10)
    assert torch.equal(router.selection_bias.bias, 1e-3 * torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    centred = vary(resolve("smoe-bias"), balance={"bias_centred": True})
    router = build_router(centred, SIZES)
    router.update_all(stats([8, 4, 4, 4]), 1, 10)
    assert abs(float(router.selection_bias.bias.sum())) < 1e-9


def test_bias_moves_selection_and_not_weights() -> None:
    router = build_router(resolve("smoe-bias"), SIZES)
    initialize_router(router)
    x = torch.randn(50, 12)
    before, _ = router(x, (), None, RouterContext(1, 50))
    router.selection_bias.bias[3] = 10.0
    after, _ = router(x, (), None, RouterContext(1, 50))
    assert (after.experts == 3).any(-1).all()
    assert torch.equal(before.probs, after.probs)
    wanted = after.probs.gather(-1, after.experts)
    assert (after.weights - wanted / wanted.sum(-1, keepdim=True)).abs().max() < 1e-6


def initialize_router(router: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.5)


def test_relu_weight_follows_sparsity() -> None:
    router = build_router(resolve("remoe"), SIZES)
    router.update_all(stats([9, 9, 9, 9]), 1, 10)  # 3.6 active per token, k = 2: too many
    assert math.isclose(float(router.gate.l1_weight), 1.2e-8, rel_tol=1e-6)
    for _ in range(2):
        router.update_all(stats([1, 1, 1, 1]), 2, 10)
    assert math.isclose(float(router.gate.l1_weight), 1e-8 / 1.2, rel_tol=1e-6)


@pytest.mark.parametrize(("counts", "end"), [([9, 9, 9, 9], 1e10), ([1, 1, 1, 1], 2.0**-126)])
def test_relu_weight_neither_overflows_nor_is_lost(counts: list[int], end: float) -> None:
    """A scorer without a bias on inputs of mean zero has half its scores above zero, whatever the weight."""
    router = build_router(resolve("remoe"), SIZES)
    for _ in range(600):
        router.update_all(stats(counts), 1, 10)
    assert router.gate.l1_weight.item() == end


def test_k_grows() -> None:
    spec = vary(resolve("smoe"), gate=Softmax.Config(start_k=1))
    router = build_router(spec, Geometry(12, 8, 5))
    initialize_router(router)
    used = []
    for step in range(11):
        if step:
            router.update_all(stats([1] * 8), step, 10)
        routing, _ = router(torch.randn(6, 12), (), None, RouterContext(1, 6))
        used.append(int((routing.experts < 8).sum(-1).unique()))
        assert (routing.weights.sum(-1) - 1).abs().max() < 1e-6
    assert used == [1 + round(4 * step / 10) for step in range(11)]


def test_stable_switches_stage_and_freezes() -> None:
    router = build_router(resolve("stable-moe"), Geometry(12, 4, 1, vocab_size=30))
    initialize_router(router)
    ids = torch.randint(0, 30, (40,))
    x = torch.randn(40, 12)
    context = RouterContext(1, 40, token_ids=ids)
    router.update_all(stats([1, 1, 1, 1]), 1, 20)
    assert int(router.stage) == 1
    router.update_all(stats([1, 1, 1, 1]), 2, 20)
    assert int(router.stage) == 2
    routing, _ = router(x, (), None, context)
    student = router.word_router(router.word_embeddings[ids])
    assert torch.equal(routing.experts[:, 0], student.argmax(-1))
    (routing.weights.sum() + routing.penalty).backward()
    assert (router.word_embeddings.grad == 0).all()
    assert (router.word_router.weight.grad == 0).all()
    assert (router.centroids.grad != 0).any()


@pytest.mark.parametrize("start", [0.2, 5.0])
def test_temperature_reaches_the_target_entropy(start: float) -> None:
    spec = vary(resolve("smoe"), temperature=Temperature.Config(start=start, target_entropy=0.9, rate=0.5))
    router = build_router(spec, SIZES)
    initialize_router(router)
    x = torch.randn(400, 12)
    for step in range(1, 200):
        routing, _ = router(x, (), None, RouterContext(1, 400))
        router.update_all(router_stats((routing,), 4, None), step, 200)
    entropy = torch.special.entr(routing.probs).sum(-1).mean()
    assert abs(float(entropy) - 0.9) < 0.01


def test_temperature_schedule() -> None:
    spec = vary(resolve("smoe"), temperature=Temperature.Config(start=2.0, end=0.5))
    router = build_router(spec, SIZES)
    router.update_all(stats([1] * 4), 5, 10)
    assert math.isclose(float(router.temperature.log_value.exp()), 1.0, rel_tol=1e-6)
    router.update_all(stats([1] * 4), 10, 10)
    assert math.isclose(float(router.temperature.log_value.exp()), 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("router", ["smoe-bias", "remoe", "smoe-dropout", "smoe-entropy", "stable-moe"])
def test_forward_never_moves_state(router: str) -> None:
    net = model(router=router, num_experts_per_tok=1 if router == "stable-moe" else 2, num_experts=8).train()
    net.gradient_checkpointing_enable()
    before = {n: b.clone() for n, b in net.named_buffers() if ".gate." in n}
    assert before
    net(tokens(), labels=tokens()).loss.backward()
    for name, buffer in net.named_buffers():
        if name in before:
            assert torch.equal(buffer, before[name]), name


def test_state_is_saved() -> None:
    for name in ("smoe-bias", "remoe", "smoe-dropout", "smoe-entropy"):
        keys = build_router(resolve(name), Geometry(12, 8, 2)).state_dict().keys()
        assert any(key.split(".")[-1] in ("bias", "l1_weight", "current_k", "log_value") for key in keys), (
            name
        )


def test_global_batch_counts_across_micro_batches() -> None:
    """The second micro-batch's loss uses the shares of both: the gradient equals that of the whole batch at once."""
    config = {"router": "smoe-global", "hidden_dropout": 0.0}
    whole, split = model(**config), model(**config)
    ids = tokens(4, 9)
    first = split(ids[:2], labels=ids[:2])
    second = split(ids[2:], labels=ids[2:], router_stats=first.router_stats)
    total = first.router_stats.add(second.router_stats)
    out = whole(ids, labels=ids)
    assert torch.equal(total.counts, out.router_stats.counts)
    shares = total.counts / total.counts.sum(-1, keepdim=True)
    with torch.no_grad():
        routing = split(ids[2:], output_routing=True).routing
        means = torch.stack([r.probs.mean(0) for r in routing])
    wanted = 0.01 * 5 * (shares * means).sum(-1).mean()
    assert abs(float(second.balance_loss.detach()) - float(wanted)) < 1e-7


# ---- noise -----------------------------------------------------------------------------------------------


def test_noise_is_uniform_and_independent() -> None:
    from scipy import stats as scipy_stats

    draws = Noise(torch.tensor(1), 0)
    first, second = draws.uniform(torch.empty(20000)), draws.uniform(torch.empty(20000))
    other_layer = Noise(torch.tensor(1), 1).uniform(torch.empty(20000))
    other_key = Noise(torch.tensor(2), 0).uniform(torch.empty(20000))
    for sample in (first, second, other_layer, other_key):
        assert scipy_stats.kstest(sample.numpy(), "uniform").pvalue > 1e-3
        assert sample.min() > 0
        assert sample.max() < 1
    for other in (second, other_layer, other_key):
        assert abs(float(torch.corrcoef(torch.stack((first, other)))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack((first[1:], first[:-1])))[0, 1])) < 0.03


def test_noise_distributions() -> None:
    from scipy import stats as scipy_stats

    noise = Noise(torch.tensor(9))
    assert scipy_stats.kstest(noise.normal(torch.empty(20000)).numpy(), "norm").pvalue > 1e-3
    assert scipy_stats.kstest(noise.exponential(torch.empty(20000)).numpy(), "expon").pvalue > 1e-3


def test_noise_leaves_the_default_generator_alone() -> None:
    """So dropout masks are equal whatever a router draws."""
    net = model(router="noisy-topk").train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    net(tokens(), labels=tokens()).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_key_advances_and_can_be_set() -> None:
    net = model(router="noisy-topk").train()
    net.set_routing_noise(3, 0)
    a, b = net(tokens()).logits, net(tokens()).logits
    assert not torch.equal(a, b)
    net.set_routing_noise(3, 0)
    assert torch.equal(net(tokens()).logits, a)
    net.set_routing_noise(3, 1)
    assert torch.equal(net(tokens()).logits, b)


def test_jitter_and_mlp_dropout_act_only_in_training() -> None:
    for spec in (
        vary(resolve("smoe"), router=Router.Config(input_jitter=0.3)),
        vary(resolve("smoe"), scorer=MLP.Config(width=64, dropout=0.5)),
    ):
        router = build_router(spec, SIZES)
        initialize_router(router)
        x = torch.randn(100, 12)
        plain, _ = router(x, (), None, RouterContext(1, 100))
        noisy, _ = router(x, (), None, RouterContext(1, 100, noise=Noise(torch.tensor(1))))
        assert not torch.equal(plain.logits, noisy.logits)
        again, _ = router(x, (), None, RouterContext(1, 100))
        assert torch.equal(plain.logits, again.logits)


def test_gshard_keeps_the_second_expert_with_its_probability() -> None:
    router = build_router(vary(resolve("gshard"), balance=BalanceSpec()), SIZES)
    initialize_router(router)
    x = torch.randn(1, 12).expand(20000, 12)
    routing, _ = router(x, (), None, RouterContext(1, 20000, noise=Noise(torch.tensor(1))))
    plain, _ = router(x[:1], (), None, RouterContext(1, 1))
    kept = (routing.experts[:, 1] < 4).double().mean()
    wanted = min(1.0, 2 * float(plain.weights[0, 1].detach()))
    assert wanted > 0.05
    assert abs(float(kept) - wanted) < 0.015


def test_noisy_topk_against_the_paper() -> None:
    """Its penalty, from the definitions: importance and load, each a squared coefficient of variation."""
    router = build_router(resolve("noisy-topk"), SIZES).double()
    initialize_router(router)
    x = torch.randn(30, 12, dtype=torch.float64)
    routing, _ = router(x, (), None, RouterContext(1, 30, noise=Noise(torch.tensor(5))))
    std = torch.nn.functional.softplus(x @ router.noise_map.weight.T) + 1e-2
    noisy = routing.logits + std * Noise(torch.tensor(5)).normal(routing.logits)
    importance, load = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for t in range(30):
        for n in range(4):
            others = sorted((float(noisy[t, m]) for m in range(4) if m != n), reverse=True)
            z = (float(routing.logits[t, n]) - others[1]) / float(std[t, n])
            load[n] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
        for slot in range(2):
            importance[routing.experts[t, slot]] += routing.weights[t, slot].detach()
    wanted = sum(0.1 * v.var(correction=0) / v.mean() ** 2 for v in (importance, load))
    assert abs(float(routing.penalty.detach()) - float(wanted)) < 1e-8


# ---- capacity --------------------------------------------------------------------------------------------


def test_capacity_drops_late_tokens_and_never_pads() -> None:
    spec = vary(resolve("smoe"), balance=BalanceSpec(losses=(LoadBalance(),), capacity_factor=0.5))
    router = build_router(spec, SIZES)
    initialize_router(router)
    mask = torch.ones(24, dtype=torch.bool)
    mask[:4] = False
    routing, _ = router(torch.randn(24, 12), (), None, RouterContext(2, 12, mask))
    capacity = math.ceil(0.5 * 20 * 2 / 4)
    taken = [0] * 4
    for t in range(24):
        for slot in range(2):
            expert, dropped = int(routing.experts[t, slot]), bool(routing.dropped[t, slot])
            if not mask[t]:
                assert not dropped
                continue
            assert dropped == (taken[expert] >= capacity)
            assert (routing.weights[t, slot] == 0) == dropped
            taken[expert] += 1


@pytest.mark.parametrize("router", ["expert-choice", "remoe", "gshard", "sparsemixer"])
def test_a_gate_without_bias_refuses_one(router: str) -> None:
    with pytest.raises(RequestError, match=r"balance\.bias_update_rate is 0\.001"):
        vary(resolve(router), balance=BalanceSpec(bias_update_rate=1e-3))


def test_specs_that_cannot_work_are_refused() -> None:
    with pytest.raises(RequestError, match=r"router\.scorer is None"):
        RouterSpec(scorer=None)
    with pytest.raises(RequestError, match="vocab_size"):
        build_router(resolve("hash"), Geometry(12, 4, 2))
    with pytest.raises(RequestError, match=r"temperature\.end is 2\.0"):
        Temperature.Config(end=2.0, target_entropy=1.0)


def test_default_model_initialises_from_a_seed() -> None:
    nets = [RMoEForCausalLM(RMoEConfig(num_hidden_layers=1, hidden_size=32)) for _ in range(2)]
    for net in nets:
        initialize(net, 3)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_vocabulary_that_keeps_its_size_keeps_its_parameter():
    """An optimizer may have it."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 1,
    }
    model = RMoEForCausalLM(RMoEConfig(**sizes, router="stable-moe"))
    before = [parameter for _, parameter in model.named_parameters()]
    model.resize_token_embeddings(64)
    assert all(one is other for one, (_, other) in zip(before, model.named_parameters(), strict=True))
