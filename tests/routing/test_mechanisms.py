"""What one layer without padding does not show: padding, several layers, noise streams, limits, initial values."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.routing import (
    ZOO,
    BalanceSpec,
    Geometry,
    Noise,
    RouterContext,
    RouterSpec,
    RouterStats,
    Routing,
    balance_loss,
    build_router,
    build_shared,
    dispatched_experts,
    find,
    gate_entropy,
    gru_cpu,
    resolve,
    router_stats,
    vary,
)
from rmoe.routing.balance import SelectionBias, limit_capacity
from rmoe.routing.block_ffn import ActivationLocality, ChunkSparsity
from rmoe.routing.cells import SHARED_CELLS
from rmoe.routing.contract import count_assignments, count_by_layer, on_device
from rmoe.routing.cosine import Cosine
from rmoe.routing.gate import Sigmoid, Softmax, TopK
from rmoe.routing.losses import (
    DiverseSimple,
    GateEntropy,
    LoadBalance,
    Loss,
    LossView,
    MutualInformation,
    SequenceBalance,
    SimilarityPreserving,
    ZLoss,
)
from rmoe.routing.null_experts import NullBalance
from rmoe.routing.other_gates import ReLU, SparseMixer
from rmoe.routing.recurrence import Recurrence
from rmoe.routing.router import Router
from rmoe.routing.scorer import MLP, EdaHead, Hypernetwork, Linear, Scorer
from rmoe.routing.spec import with_options
from rmoe.routing.temperature import Temperature
from rmoe.routing.token_routers import Hash, Stable
from rmoe.routing.zero_experts import HeterogeneousBalance
from rmoe.routing.zoo import RMOE
from tests import naive
from tests.contract.test_contract import EXPERTS, LAYERS, VOCAB, Routers, data, dense

KEY = 11


# ---- noise: the same numbers from Python's integers ------------------------------------------------------


def mixed(x: int) -> int:
    """splitmix64 on Python's integers, unsigned (Steele, Lea, Flood 2014)."""
    whole = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & whole
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
    return x ^ (x >> 31)


def uniforms(key: int, layer: int, use: int, shape: tuple[int, ...]) -> Tensor:
    stream = mixed((mixed(key) + (layer << 8) + use) & ((1 << 64) - 1))
    numbers = [(mixed((stream + i) & ((1 << 64) - 1)) >> 40) + 0.5 for i in range(math.prod(shape))]
    return torch.tensor(numbers, dtype=torch.float64).view(shape) / 2**24


def noise(layer: int = 0) -> Noise:
    return Noise(torch.tensor(KEY), layer)


@pytest.mark.parametrize("layer", [0, 1, 5])
def test_noise_is_keyed_by_layer_and_use(layer: int) -> None:
    like = torch.empty(3, 7, dtype=torch.float64)
    stream = noise().for_layer(layer)
    assert torch.equal(stream.uniform(like), uniforms(KEY, layer, 0, (3, 7)))
    assert torch.equal(stream.exponential(like), -uniforms(KEY, layer, 1, (3, 7)).log())
    want = math.sqrt(2) * torch.erfinv(2 * uniforms(KEY, layer, 2, (3, 7)) - 1)
    assert (stream.normal(like) - want).abs().max() < 1e-9
    assert stream.uniform(like.float()).dtype == torch.float32
    assert torch.equal(noise(layer).uniform(like), uniforms(KEY, layer, 0, (3, 7)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [0, -1])
def test_the_rarest_noise_is_finite(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits zero, or all one: once in 2^24 numbers, which a training step draws in seconds."""
    monkeypatch.setattr("rmoe.routing.noise.splitmix64", lambda x: torch.full_like(x, bits))
    like = torch.empty(3, dtype=dtype)
    uniform, exponential, normal = noise().uniform(like), noise().exponential(like), noise().normal(like)
    assert ((uniform > 0) & (uniform < 1)).all()
    assert ((exponential > 0) & exponential.log().isfinite()).all()
    assert (normal.isfinite() & (normal.abs() > 5)).all()
    assert uniform.dtype == exponential.dtype == normal.dtype == dtype


def layer_of(name: str | RouterSpec, layer: int, experts: int = 6, top_k: int = 2, seed: int = 0):  # type: ignore[no-untyped-def]
    """One layer's router in float64, filled."""
    spec = resolve(name) if isinstance(name, str) else name
    router = build_router(spec, Geometry(12, experts, top_k, LAYERS, layer, VOCAB)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return router


def inputs(tokens: int = 23, seed: int = 1) -> Tensor:
    return torch.randn(tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, 2])
def test_each_layer_draws_its_own_noise(layer: int) -> None:
    """Jitter on the input, noise on the scores, dropout in the scorer: by hand from the layer's own stream."""
    x = inputs()
    context = RouterContext(1, 23, noise=noise())

    jittered = layer_of(vary(resolve("smoe"), router=Router.Config(input_jitter=0.3)), layer)
    wanted = x * (1 + 0.3 * (2 * uniforms(KEY, layer, 0, (23, 12)) - 1)) @ jittered.scorer.linear.weight.T
    assert (jittered(x, (), None, context)[0].logits - wanted).abs().max() < 1e-12

    noisy = layer_of("noisy-topk", layer)
    clean = x @ noisy.scorer.linear.weight.T
    std = torch.log1p(torch.exp(x @ noisy.noise_map.weight.T)) + 0.01
    scores = clean + std * torch.special.ndtri(uniforms(KEY, layer, 0, (23, 6)))
    routing = noisy(x, (), None, context)[0]
    assert torch.equal(routing.experts, scores.topk(2).indices)
    assert (routing.weights - scores.topk(2).values.softmax(-1)).abs().max() < 1e-12
    assert (routing.logits - clean).abs().max() < 1e-12  # raw scores come out without the noise
    plain = noisy(x, (), None, RouterContext(1, 23))[0]
    assert torch.equal(plain.experts, clean.topk(2).indices)
    assert plain.penalty is None

    dropping = layer_of(vary(resolve("smoe-mlp"), scorer={"width": 31, "dropout": 0.4}), layer)
    kept = uniforms(KEY, layer, 0, (23, 31)) >= 0.4
    hidden = torch.nn.functional.gelu(x @ dropping.scorer.up.weight.T + dropping.scorer.up.bias)
    wanted = (hidden * kept / 0.6) @ dropping.scorer.out.weight.T  # its mean is that without dropout
    assert (dropping(x, (), None, context)[0].logits - wanted).abs().max() < 1e-12
    wanted = hidden @ dropping.scorer.out.weight.T
    assert (dropping(x, (), None, RouterContext(1, 23))[0].logits - wanted).abs().max() < 1e-12


def test_gshard_sampled_draws_the_second_by_gumbel_noise() -> None:
    """The second expert is the argmax over the rest of `score + Gumbel`; outside training the best of the rest."""
    router, x = layer_of("gshard-sampled", 1), inputs(40)
    routing = router(x, (), None, RouterContext(1, 40, noise=noise()))[0]
    logits = x @ router.scorer.linear.weight.T
    gumbel = -torch.log(-torch.log(uniforms(KEY, 1, 0, (40, 6))))
    probs = logits.softmax(-1)
    differs = 0
    for t in range(40):
        first = int(logits[t].argmax())
        second = max((n for n in range(6) if n != first), key=lambda n: float(logits[t, n] + gumbel[t, n]))
        assert routing.experts[t].tolist() == [first, second]
        pair = probs[t, [first, second]]
        assert (routing.weights[t] - pair / pair.sum()).abs().max() < 1e-12
        differs += second != int(logits[t].topk(2).indices[1])
    assert differs > 5
    plain = router(x, (), None, RouterContext(1, 40))[0]
    assert torch.equal(plain.experts, logits.topk(2).indices)


def test_gshard_random_keeps_the_second_by_its_own_draw() -> None:
    router, x = layer_of(vary(resolve("gshard"), balance=BalanceSpec()), 2), inputs(60)
    routing = router(x, (), None, RouterContext(1, 60, noise=noise()))[0]
    plain = router(x, (), None, RouterContext(1, 60))[0]
    draws = uniforms(KEY, 2, 0, (60,))
    for t in range(60):
        kept = bool(draws[t] < 2 * plain.weights[t, 1])
        assert routing.experts[t].tolist() == [
            int(plain.experts[t, 0]),
            int(plain.experts[t, 1]) if kept else 6,
        ]
        assert float(routing.weights[t, 0]) == float(plain.weights[t, 0])
        assert float(routing.weights[t, 1]) == (float(plain.weights[t, 1]) if kept else 0.0)
    assert 5 < int((routing.experts == 6).sum()) < 55


# ---- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_padding_is_not_there(name: str, training: bool) -> None:
    """Real tokens' routing, every loss and every count: those of the same tokens alone. Pads hold large numbers.

    They stand at the end of one sequence: the noise of a token depends on its position.
    """
    routers = Routers(name).double().train(training)
    for buffer_name, buffer in routers.named_buffers():
        if buffer_name.endswith("l1_weight"):
            buffer.fill_(0.3)
    x, ids = data()
    tokens, stream = x.shape[1], noise() if training else None

    def run(x: Tensor, ids: Tensor, mask: Tensor | None) -> tuple[list[Routing], Tensor, RouterStats]:
        context = RouterContext(1, x.shape[1], mask, ids, stream)
        state, routings = (), []
        for router, one in zip(routers.routers, x, strict=True):
            routing, state = router(one, state, routers.router_shared, context)
            routings.append(routing)
        loss = balance_loss(list(routers.routers), routings, context, 0.01)
        return routings, loss, router_stats(tuple(routings), EXPERTS, mask)

    for real in (tokens - 5, 1) if not training else (tokens - 5,):
        padded = x.clone()
        padded[:, real:] = 40 * padded[:, real:]
        got, loss, stats = run(padded, ids, torch.arange(tokens) < real)
        want, want_loss, want_stats = run(padded[:, :real], ids[:real], None)
        for a, b in zip(got, want, strict=True):
            assert (dense(a)[:real] - dense(b)).abs().max() < 1e-12
            assert torch.equal(dense(a)[:real] > 0, dense(b) > 0)
        assert abs(float(loss.detach() - want_loss.detach())) < 1e-12
        assert torch.equal(stats.counts, want_stats.counts)
        assert int(stats.tokens) == int(want_stats.tokens) == real
        assert torch.equal(stats.dropped, want_stats.dropped)
        assert (stats.entropy - want_stats.entropy).abs().max() < 1e-4
    _, loss, stats = run(x, ids, torch.zeros(tokens, dtype=torch.bool))  # nothing but pads
    assert torch.isfinite(loss)
    assert int(stats.tokens) == int(stats.counts.sum()) == 0


# ---- balance losses, several sequences padded on either side ----------------------------------------------

SEVERAL = torch.tensor(
    [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
).bool()
ONE = torch.tensor([[0, 1, 1, 1, 1]]).bool()


def naive_loss(kind: str, logits: Tensor, chosen: Tensor, mask: Tensor, count: str) -> Tensor:
    """One layer's loss from its definition; `logits` `[B, S, E]` float64, `chosen` `[B, S, K]`, `mask` `[B, S]`."""
    experts = logits.shape[-1]
    real = [(b, s) for b, s in mask.nonzero().tolist()]

    def product(tokens: list[tuple[int, int]]) -> Tensor:
        picks = [int(n) for b, s in tokens for n in chosen[b, s] if n < experts]
        total: Tensor = logits.new_zeros(())
        for n in range(experts):
            mean = sum(naive.softmax(logits[b, s])[n] for b, s in tokens) / len(tokens)
            share = picks.count(n) / (len(picks) if count == "assignments" else len(picks) / chosen.shape[-1])
            total = total + experts * share * mean
        return total

    if kind == "load_balance":
        return product(real)
    if kind == "sequence_balance":  # a sequence of pads alone is none
        present = sorted({b for b, _ in real})
        parts = [product([(b, s) for b, s in real if b == row]) for row in present]
        return sum(parts) / len(parts)  # type: ignore[return-value]
    if kind == "z":
        return sum(torch.log(torch.exp(logits[b, s]).sum()) ** 2 for b, s in real) / len(real)  # type: ignore[return-value]
    probs = [naive.softmax(logits[b, s]) for b, s in real]
    mean = sum(probs) / len(probs)
    return sum(-(p * torch.log(p)).sum() for p in probs) / len(probs) + (mean * torch.log(mean)).sum()  # type: ignore[return-value]


@pytest.mark.parametrize(("layers", "mask"), [(1, ONE), (3, SEVERAL)])
@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (LoadBalance(weight=0.7), "assignments"),
        (LoadBalance(weight=0.7, count="tokens"), "tokens"),
        (LoadBalance(), "assignments"),  # the model's coefficient
        (ZLoss(weight=0.7), ""),
        (SequenceBalance(weight=0.7), "assignments"),
        (MutualInformation(weight=0.7), ""),
    ],
)
def test_losses_over_layers_and_padded_sequences(loss: Loss, count: str, layers: int, mask: Tensor) -> None:
    spec = vary(resolve("smoe"), balance=BalanceSpec(losses=(loss,)))
    routers = [layer_of(spec, i, seed=i) for i in range(layers)]
    batch, tokens = len(mask), mask.numel()
    x = [inputs(tokens, seed=i).requires_grad_() for i in range(layers)]
    context = RouterContext(batch, 5, mask.reshape(-1))
    routings = [router(one, (), None, context)[0] for router, one in zip(routers, x, strict=True)]
    got = balance_loss(routers, routings, context, 0.3)
    by_layer = [
        naive_loss(loss.kind, r.logits.view(batch, 5, -1), r.experts.view(batch, 5, -1), mask, count)
        for r in routings
    ]
    wanted = (loss.weight or 0.3) * sum(by_layer) / layers
    assert abs(float(got.detach() - wanted.detach())) < 1e-12
    gradients = torch.autograd.grad(got, x, retain_graph=True), torch.autograd.grad(wanted, x)
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_a_loss_gives_one_number_per_layer() -> None:
    """What one layer gets depends on that layer alone."""
    losses = (
        LoadBalance(),
        ZLoss(),
        SequenceBalance(),
        MutualInformation(),
        SimilarityPreserving(),
        DiverseSimple(),
        ActivationLocality(),
        ChunkSparsity(chunk=2),
        HeterogeneousBalance(),
    )
    spec = vary(resolve("smoe"), balance=BalanceSpec(losses=losses))
    routers = [layer_of(spec, i, seed=i) for i in range(3)]
    context = RouterContext(5, 5, SEVERAL.reshape(-1))
    routings = [r(inputs(25, seed=i), (), None, context)[0] for i, r in enumerate(routers)]

    def view(chosen: list[int]) -> LossView:
        stacked = (
            torch.stack([getattr(routings[i], name) for i in chosen])
            for name in ("logits", "probs", "experts", "experts")
        )
        counts = count_by_layer([routings[i] for i in chosen], 6, context.mask)
        return LossView(*stacked, context, counts, 6, 2, [routers[i].experts_matrix(None) for i in chosen])

    for loss in losses:
        together = loss(view([0, 1, 2]))
        assert together.shape == (3,)
        for i in range(3):
            assert abs(float((together[i] - loss(view([i]))[0]).detach())) < 1e-12
        assert (together[0] - together[1]).abs() > 1e-4


def test_penalties_are_the_mean_over_layers_and_added_to_the_losses() -> None:
    spec = vary(resolve("remoe"), balance=BalanceSpec(losses=(ZLoss(weight=1.0),)))
    routers = [layer_of(spec, i, seed=i) for i in range(3)]
    context = RouterContext(1, 20)
    routings = [r(inputs(20, seed=i), (), None, context)[0] for i, r in enumerate(routers)]
    z = sum(torch.logsumexp(r.logits, -1).square().mean() for r in routings) / 3
    penalties = sum(r.penalty for r in routings) / 3
    assert float(penalties.detach()) > 0
    got = balance_loss(routers, routings, context, 0.5)
    assert abs(float((got - z - penalties).detach())) < 1e-12
    bare = [layer_of(vary(resolve("smoe"), balance=BalanceSpec()), i) for i in range(2)]
    routings = [r(inputs(20), (), None, context)[0] for r in bare]
    assert float(balance_loss(bare, routings, context, 0.5)) == 0.0


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, False])])
def test_penalties_of_a_single_token_by_hand(mask: Tensor | None) -> None:
    x = inputs(1 if mask is None else 3)
    relu = layer_of("remoe", 0)
    relu.gate.l1_weight.fill_(0.3)
    scores = (x[0] @ relu.scorer.linear.weight.T).clamp(min=0)
    got = relu(x, (), None, RouterContext(1, len(x), mask))[0].penalty
    wanted = float(relu.gate.l1_weight) * (6 / 2) * scores.sum()  # each expert in use has a share of 1
    assert abs(float((got - wanted).detach())) < 1e-9

    stable, ids = layer_of("stable-moe", 0, top_k=1), torch.tensor([5, 7, 7])[: len(x)]
    scores = x[0] @ stable.centroids.T
    best = int(scores.argmax())
    balance = (
        (1 - 1 / 6) / (1 / 6) * torch.sigmoid(scores[best])
    )  # one expert has a load of 1, the mean is 1/6
    student = stable.word_router.weight @ stable.word_embeddings[5]
    wanted = 0.3 * balance - torch.log_softmax(student, 0)[best]
    got = stable(x, (), None, RouterContext(1, len(x), mask, ids))[0].penalty
    assert abs(float((got - wanted).detach())) < 1e-9


def test_similarity_needs_a_matrix() -> None:
    spec = vary(resolve("smoe-similarity"), scorer=Linear.Config(shared_layers=0))
    sizes = Geometry(12, 6, 2, LAYERS, 0, VOCAB)
    shared, routers = build_shared(spec, sizes), [layer_of(spec, i) for i in range(2)]
    assert shared is not None
    torch.nn.init.normal_(shared.scorer.groups[0].weight)
    context = RouterContext(1, 9)
    routings = [r(inputs(9), (), shared, context)[0] for r in routers]
    matrix = shared.scorer.groups[0].weight
    wanted = 1e-2 * (matrix @ matrix.T - torch.eye(6)).abs().sum() / 36
    got = balance_loss(routers, routings, context, 0.5)
    assert abs(float((got - wanted).detach())) < 1e-6
    hashed = RouterSpec(
        router=Hash.Config(), scorer=None, gate=None, balance=BalanceSpec(losses=(SimilarityPreserving(),))
    )
    router = layer_of(hashed, 0)
    context = RouterContext(1, 9, token_ids=torch.arange(9))
    routing = router(inputs(9), (), None, context)[0]
    with pytest.raises(RequestError, match=r"balance\.losses is 'similarity_preserving'"):
        balance_loss([router], [routing], context, 0.5)


@pytest.mark.parametrize("tau", [0.3, 0.75, 1.0])
def test_choices_divide_as_tau_says(tau: float) -> None:
    """By its loss alone the experts that compute get `tau E / (tau E + Z)` of all choices (MoE++, Table 1)."""
    balance = BalanceSpec(losses=(HeterogeneousBalance(tau=tau),))
    router = layer_of(vary(resolve("moepp-experts"), balance=balance), 0, experts=8)
    x, context = inputs(1024), RouterContext(1, 1024)
    optimizer = torch.optim.Adam([router.scorer.linear.weight], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        balance_loss([router], [router(x, (), None, context)[0]], context, 1.0).backward()
        optimizer.step()
    computing = float((router(x, (), None, context)[0].experts < 8).double().mean())
    assert computing == pytest.approx(tau * 8 / (tau * 8 + 4), abs=0.05)


def test_what_computes_nothing_is_balanced_with_padding_and_a_batch_in_parts() -> None:
    """Two layers; padding counts nowhere; the experts' shares may be a larger batch's, how many are theirs is not."""
    routers = [layer_of("moepp-experts", layer) for layer in range(2)]
    mask = torch.arange(23) % 5 != 0
    context = RouterContext(1, 23, mask)
    earlier = torch.tensor([[5, 0, 3, 9, 1, 2], [0, 0, 40, 0, 0, 0]])
    for scope in ("micro_batch", "global_batch"):
        spec = BalanceSpec(losses=(HeterogeneousBalance(tau=0.5),), scope=scope)
        for router in routers:
            router.spec = vary(router.spec, balance=spec)
        routings = [router(inputs(seed=layer), (), None, context)[0] for layer, router in enumerate(routers)]
        wanted = 0.0
        for layer, routing in enumerate(routings):
            asked = [sum(c.count(n) for c in routing.classes[mask].tolist()) for n in range(10)]
            counts = [*asked[:6]]
            if scope == "global_batch":
                counts = [n + more for n, more in zip(counts, earlier[layer].tolist(), strict=True)]
            own = sum(asked[:6]) / sum(asked)
            shares = [own * n / sum(counts) for n in counts] + [0.5 * n / sum(asked) for n in asked[6:]]
            mean = routing.probs[mask].mean(0)
            wanted += 10 * float(sum(f * p for f, p in zip(shares, mean, strict=True)))
        got = balance_loss(routers, routings, context, 1.0, earlier)
        assert float(got.detach()) == pytest.approx(wanted / 2, abs=1e-12)


# ---- training-time state of several layers ----------------------------------------------------------------


def sums(counts: list[list[int]], tokens: int, entropy: tuple[float, ...] | None = None) -> RouterStats:
    layers = len(counts)
    of_entropy = torch.zeros(layers) if entropy is None else torch.tensor(entropy)
    none = torch.zeros(layers, dtype=torch.int64)
    return RouterStats(torch.tensor(counts), torch.tensor(tokens), of_entropy, none, torch.zeros(layers))


def three_layers(entropy: tuple[float, ...] = (1.0, 8.0, 4.0)) -> RouterStats:
    return sums([[9, 1, 4, 2], [1, 9, 2, 4], [4, 4, 4, 4]], 8, entropy)


def test_each_layer_follows_its_own_load() -> None:
    for layer, wanted in enumerate(([-1, 1, 0, 1], [1, -1, 1, 0], [0, 0, 0, 0])):
        router = layer_of("smoe-bias", layer, experts=4).float()
        router.update_all(three_layers(), 1, 10)
        assert torch.equal(router.selection_bias.bias, 1e-3 * torch.tensor(wanted, dtype=torch.float32))
        centred = layer_of(vary(resolve("smoe-bias"), balance={"bias_centred": True}), layer, experts=4)
        for _ in range(2):
            centred.update_all(three_layers(), 1, 10)
        direction = torch.tensor(wanted, dtype=torch.float64)
        assert (centred.selection_bias.bias - 2e-3 * (direction - direction.mean())).abs().max() < 1e-9


def test_each_layer_steers_its_own_entropy() -> None:
    """`ln T += rate (target - sum / tokens)`."""
    spec = vary(resolve("smoe"), temperature=Temperature.Config(start=2.0, target_entropy=0.9, rate=0.5))
    for layer, entropy in enumerate((1.0, 8.0, 4.0)):
        router = layer_of(spec, layer, experts=4)
        router.update_all(three_layers(), 1, 10)
        wanted = math.log(2) + 0.5 * (0.9 - entropy / 8)
        assert math.isclose(float(router.temperature.log_value), wanted, rel_tol=1e-6)


def test_temperature_divides_the_scores_and_moves_geometrically() -> None:
    spec = vary(resolve("smoe"), temperature=Temperature.Config(start=4.0, end=1.0))
    router, x = layer_of(spec, 0), inputs()
    past_the_end = (9, 1.0)
    for step, wanted in ((None, 4.0), (1, 4.0**0.75), (3, 4.0**0.25), (4, 1.0), past_the_end):
        if step:
            router.update_all(three_layers(), step, 4)
        routing = router(x, (), None, RouterContext(1, 23))[0]
        assert (routing.probs - (routing.logits / wanted).softmax(-1)).abs().max() < 1e-6
    held = layer_of(vary(resolve("smoe"), temperature=Temperature.Config(start=4.0)), 0)
    held.update_all(three_layers(), 3, 4)
    assert math.isclose(float(held.temperature.log_value), math.log(4), rel_tol=1e-6)


def test_relu_weight_follows_the_mean_over_layers() -> None:
    """`lambda` grows by 1.2 above k active experts a token, shrinks below, and stays at exactly k."""
    counts = {9: 1.2, 8: 1.0, 7: 1 / 1.2}  # first layer; the second has 8, and k T = 8
    for first, factor in counts.items():
        stats = sums([[first, 0], [8, 0]], 4)
        for layer in range(2):
            router = layer_of("remoe", layer, experts=4)
            router.update_all(stats, 1, 10)
            assert math.isclose(float(router.gate.l1_weight), 1e-8 * factor, rel_tol=1e-6)
    empty = sums([[0, 0, 0, 0]] * 2, 0)
    before = float(router.gate.l1_weight)
    router.update_all(empty, 1, 10)  # no token at all is fewer than k experts a token, not a division by zero
    assert math.isclose(float(router.gate.l1_weight), before / 1.2, rel_tol=1e-6)


def test_k_and_stage_stop_at_their_ends() -> None:
    growing = build_router(vary(resolve("smoe"), gate=Softmax.Config(start_k=2)), Geometry(12, 8, 5))
    for step, wanted in ((0, 2), (4, 3), (10, 5), (30, 5)):
        growing.update_all(three_layers(), step, 10)
        assert int(growing.gate.current_k) == wanted
    stable = layer_of("stable-moe", 0, top_k=1)
    for step, stage in ((9, 1), (10, 2), (9, 1), (100, 2)):
        stable.update_all(three_layers(), step, 100)
        assert int(stable.stage) == stage


def test_skip_bias_starts_at_minus_one_and_stays() -> None:
    bias = SelectionBias(
        BalanceSpec(bias_update_rate=0.5, bias_centred=True), Geometry(12, 4, 2), skip_class=True
    )
    assert bias.bias.tolist() == [0, 0, 0, 0, -1]
    bias.update(0, three_layers(), 1, 10)
    assert bias.bias.tolist() == pytest.approx([-0.625, 0.375, -0.125, 0.375, -1])
    assert SelectionBias(BalanceSpec(), Geometry(12, 4, 2), skip_class=False).bias.tolist() == [0, 0, 0, 0]


def test_state_keeps_its_dtype_but_not_its_place() -> None:
    router = build_router(
        vary(resolve("smoe-bias"), temperature=Temperature.Config(start=2.0)), Geometry(12, 4, 2)
    )
    router.bfloat16()
    assert router.scorer.linear.weight.dtype == torch.bfloat16
    assert router.selection_bias.bias.dtype == router.temperature.log_value.dtype == torch.float32
    router.to("meta")
    assert router.selection_bias.bias.device.type == "meta"


@pytest.mark.parametrize("seed", [0, 3])
def test_hash_tables_from_their_definition(seed: int) -> None:
    """Each layer its own table: of a token's E hashes the k smallest, as signed 64-bit numbers."""
    spec = RouterSpec(router=Hash.Config(table_seed=seed), scorer=None, gate=None)
    whole = 1 << 64
    for layer in range(3):
        table = build_router(spec, Geometry(12, 6, 2, 3, layer, 40)).table
        for token in range(40):

            def signed(n: int, token: int = token, layer: int = layer) -> int:
                value = mixed((mixed(token * 6 + n) + mixed(seed) + (layer << 40)) % whole)
                return value - whole if value >= whole >> 1 else value

            assert table[token].tolist() == sorted(range(6), key=signed)[:2]


def test_hash_weights_and_logits() -> None:
    router = layer_of("hash", 1, top_k=3)
    ids = torch.tensor([7, 0, 7])
    routing = router(inputs(3), (), None, RouterContext(1, 3, token_ids=ids))[0]
    assert torch.equal(routing.experts, router.table[ids])
    assert (routing.weights == 1 / 3).all()
    chosen = torch.zeros(3, 6, dtype=torch.bool).scatter(1, routing.experts, True)
    assert torch.equal(routing.logits, torch.where(chosen, 0.0, -1e4).double())
    assert (routing.probs[chosen] - 1 / 3).abs().max() < 1e-12
    with pytest.raises(ValueError, match="router 'hash' reads token ids"):
        router(inputs(3), (), None, RouterContext(1, 3))


def test_cosine_temperature_stops_at_a_hundredth() -> None:
    router, x = layer_of("cosine-moe", 0), inputs()
    unit = torch.nn.functional.normalize
    cosines = unit(x, dim=-1) @ unit(router.scorer.embeddings, dim=-1).T
    for inverse, scale in ((2.0, 2.0), (99.0, 99.0), (1000.0, 100.0)):
        router.scorer.log_inverse_temperature.data.fill_(math.log(inverse))
        assert (router(x, (), None, RouterContext(1, 23))[0].logits - scale * cosines).abs().max() < 1e-9


@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm"])
def test_cells_compute_in_the_wider_of_two_dtypes(cell: str) -> None:
    wide = SHARED_CELLS[cell](5).double()
    for i, parameter in enumerate(wide.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    x = inputs(4)[:, :5]
    state = tuple(0.1 * inputs(4, seed=i)[:, :5] for i in range(2 if cell == "lstm" else 1))
    with torch.no_grad():
        wanted = wide(x, state)
        for got in (
            wide(x.float(), tuple(s.float() for s in state)),
            wide(x, tuple(s.float() for s in state)),
        ):
            assert got[0].dtype == torch.float64
            assert (got[0] - wanted[0]).abs().max() < 1e-5
        narrow = wide.float()(x.float(), tuple(s.float() for s in state))
        assert narrow[0].dtype == torch.float32
        assert (narrow[0] - wanted[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("tokens", "axis"), [(1, 0), (4, 0), (4, 1)])
def test_stacked_grus_are_each_their_own(tokens: int, axis: int) -> None:
    """`torch.func.vmap` over models, or over inputs of one model on another axis: outputs and gradients."""
    cells = [SHARED_CELLS["gru"](5).double() for _ in range(3)]
    for i, parameter in enumerate(p for cell in cells for p in cell.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    x, h = (torch.stack([inputs(tokens, seed=10 * j + i)[:, :5] for i in range(3)]) for j in (1, 2))
    own = [dict(cell.named_parameters()) for cell in cells]
    stacked = {name: torch.stack([one[name] for one in own]) for name in own[0]}

    leaves = [
        t.clone().requires_grad_() for t in (x, h, *(stacked.values() if axis == 0 else own[0].values()))
    ]

    def step(x: Tensor, h: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(cells[0], dict(zip(own[0], parameters, strict=True)), (x, (h,)))[0]

    if axis == 0:
        out = torch.func.vmap(step)(*leaves)
    else:  # one model's weights, tokens in front
        dims = (1, 1, *[None] * len(own[0]))
        out = torch.func.vmap(step, in_dims=dims)(
            leaves[0].movedim(0, 1), leaves[1].movedim(0, 1), *leaves[2:]
        )
    got = torch.autograd.grad(out.sin().sum(), leaves)
    total = [torch.zeros_like(p) for p in own[0].values()]
    for i in range(3):
        theirs = torch.nn.GRUCell(5, 5, dtype=torch.float64)
        theirs.load_state_dict(cells[i if axis == 0 else 0].state_dict())
        their_x, their_h = x[i].clone().requires_grad_(), h[i].clone().requires_grad_()
        wanted = theirs(their_x, their_h)
        assert (out[i] - wanted).abs().max() < 1e-12
        parameters = [dict(theirs.named_parameters())[name] for name in own[0]]
        of_x, of_h, *rest = torch.autograd.grad(wanted.sin().sum(), [their_x, their_h, *parameters])
        assert (got[0][i] - of_x).abs().max() < 1e-12
        assert (got[1][i] - of_h).abs().max() < 1e-12
        for j, one in enumerate(rest):
            total[j] += one
            assert axis == 1 or (got[2 + j][i] - one).abs().max() < 1e-12
    assert axis == 0 or all((a - b).abs().max() < 1e-12 for a, b in zip(got[2:], total, strict=True))


def test_without_gradients_nothing_is_kept_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(gru_cpu.GRUOnCPU, "forward", lambda *inputs: called.append(True))
    with torch.no_grad():
        SHARED_CELLS["gru"](5)(torch.zeros(2, 5), (torch.zeros(2, 5),))
    assert called == []


WITHOUT_SCORES = {"hash", "stable-moe", "stable-moe-onestage", "dense", "uniform"}


@pytest.mark.parametrize("row", sorted(ZOO.keys() - WITHOUT_SCORES))
def test_rescaling_multiplies_the_scores(row: str) -> None:
    routers = Routers(row).double().eval()
    x, ids = data()
    scorer = routers.routers[0].scorer
    shared = None if routers.router_shared is None else routers.router_shared.scorer
    part = scorer.scaled_by(shared)
    assert part is not None
    before = routers.routers[0](x[0], (), routers.router_shared, RouterContext(3, 9, None, ids))[0].logits
    part.rescale(0.25)
    after = routers.routers[0](x[0], (), routers.router_shared, RouterContext(3, 9, None, ids))[0].logits
    assert (after - 0.25 * before).abs().max() < 1e-9


# ---- gates at their edges ---------------------------------------------------------------------------------


def test_expert_choice_from_its_definition() -> None:
    """`C = ceil(T k / E)` best tokens of each expert, an earlier token before a later one of the same score."""
    router = layer_of("expert-choice", 0, experts=6, top_k=2)
    for tokens in (1, 4, 7, 9):
        x = inputs(tokens)
        x[tokens // 2 :] = x[: tokens - tokens // 2].clone()  # ties
        routing = router(x, (), None, RouterContext(1, tokens))[0]
        probs = (x @ router.scorer.linear.weight.T).softmax(-1)
        capacity = -(-tokens * 2 // 6)
        for n in range(6):
            ranked = sorted(range(tokens), key=lambda t: -round(float(probs[t, n]), 12))
            taken = set(ranked[:capacity])
            for t in range(tokens):
                assert int(routing.experts[t, n]) == (n if t in taken else 6)
                assert abs(float(routing.weights[t, n]) - (float(probs[t, n]) if t in taken else 0)) < 1e-12


def test_capacity_counts_real_tokens_and_exact_multiples() -> None:
    """`ceil(factor T k / E)`: 12 real tokens of 16, k = 2, E = 4, factor 1 is 6, and no rounding adds one."""
    experts = torch.tensor([[0, 1]] * 16)
    experts[3] = torch.tensor([0, 4])  # an empty slot
    mask = torch.ones(16, dtype=torch.bool)
    mask[[0, 5, 9, 15]] = False
    routing = Routing(torch.zeros(16, 4), torch.zeros(16, 4), torch.ones(16, 2), experts)
    for factor, capacity in ((1.0, 6), (0.9, 6), (0.5, 3), (1.01, 7)):
        limited = limit_capacity(routing, factor, 4, 2, mask)
        taken = [0, 0]
        for t in range(16):
            for slot in range(2):
                drop = bool(mask[t]) and int(experts[t, slot]) < 4 and taken[slot] >= capacity
                taken[slot] += bool(mask[t]) and int(experts[t, slot]) < 4
                assert bool(limited.dropped[t, slot]) == drop
                assert float(limited.weights[t, slot]) == (0.0 if drop else 1.0)
                wanted = 4 if drop else int(experts[t, slot])
                assert int(dispatched_experts(limited, 4)[t, slot]) == wanted
        assert limited.dropped.sum() == (12 - capacity) + max(0, 11 - capacity)
    crowd = Routing(
        torch.zeros(100, 10), torch.zeros(100, 10), torch.ones(100, 1), torch.zeros(100, 1).long()
    )
    tenth = limit_capacity(crowd, 1.1, 10, 1, None)
    assert int(tenth.dropped.sum()) == 100 - 11  # 1.1 * 100 / 10 is a little more than 11 in floating point
    whole = limit_capacity(routing, 1.0, 4, 2, None)
    assert int(whole.dropped.sum()) == 15  # 8 of 16, and 8 of 15
    half = limit_capacity(routing, 1.0, 4, torch.tensor(1), None)
    assert int(half.dropped.sum()) == 23  # 12 of 16, and 11 of 15


@pytest.mark.parametrize("row", ["hunyuan", "smoe-dropout"])
def test_capacity_and_loss_take_the_k_of_the_layer_and_the_step(row: str) -> None:
    """`ceil(factor T k / E)` and `E sum f P` with f a share of tokens: k times as large, with the k in use."""
    loss = LoadBalance(count="tokens", weight=1.0)
    spec = vary(find(row).spec, balance={"capacity_factor": 1.0, "losses": (loss,)})
    if row == "smoe-dropout":
        spec = vary(spec, gate={"start_k": 1})
    hidden, context = inputs(tokens=64), RouterContext(1, 64)
    layers = [build_router(spec, Geometry(hidden.shape[1], 8, 2, 3, layer)) for layer in range(3)]
    for layer in layers:
        torch.nn.init.normal_(
            layer.scorer.linear.weight, generator=torch.Generator().manual_seed(layer.layer_index)
        )
    used = [1, 2, 1] if row == "hunyuan" else [1, 1, 1]
    routings = [layer(hidden, (), None, context)[0] for layer in layers]
    shares = []
    for routing, k in zip(routings, used, strict=True):
        asked, kept = (
            torch.bincount(experts.flatten(), minlength=9)[:8]
            for experts in (routing.experts, dispatched_experts(routing, 8))
        )
        assert torch.equal(kept, asked.clamp(max=8 * k))
        assert asked.sum() == 64 * k
        shares.append(8 * (asked.to(routing.probs) / 64 * routing.probs.mean(0)).sum())
    one = [balance_loss([a], [b], context, 0.0) for a, b in zip(layers, routings, strict=True)]
    torch.testing.assert_close(torch.stack(one), torch.stack(shares))
    torch.testing.assert_close(balance_loss(layers, routings, context, 0.0), torch.stack(shares).mean())


def test_growing_k_leaves_slots_empty_in_both_orders() -> None:
    x = inputs()
    for order in ("softmax_topk", "topk_softmax"):
        for renormalize in (True, False):
            gate = Softmax.Config(order=order, renormalize=renormalize, start_k=2)
            router = layer_of(vary(resolve("smoe"), gate=gate), 0, top_k=4)
            routing = router(x, (), None, RouterContext(1, 23))[0]
            assert (routing.experts[:, 2:] == 6).all()
            assert (routing.weights[:, 2:] == 0).all()
            chosen = [naive.gate(row, 2, order, renormalize) for row in routing.logits]
            assert routing.experts[:, :2].tolist() == [c for c, _ in chosen]
            wanted = torch.stack([torch.stack(w) for _, w in chosen])
            assert (routing.weights[:, :2] - wanted).abs().max() < 1e-12


def test_a_token_whose_every_slot_is_skipped_has_zero_weights() -> None:
    router = layer_of(vary(resolve("eda"), gate=Softmax.Config(renormalize=True)), 0, top_k=1)
    router.selection_bias.bias[-1] = 5.0
    routing = router(inputs(), (), None, RouterContext(1, 23))[0]
    assert (routing.experts == 6).all()
    assert (routing.weights == 0).all()


def test_entropy_and_stats_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]])
    wanted = [naive.entropy(row) for row in probs.tolist()]
    assert gate_entropy(probs).tolist() == pytest.approx(wanted, abs=1e-6)
    experts = torch.tensor([[0, 1], [0, 3], [2, 3]])  # 3 is an empty slot
    dropped = torch.tensor([[True, False], [True, False], [False, False]])
    plain = Routing(probs, probs, torch.ones(3, 2), experts)
    routings = (plain, plain._replace(dropped=dropped, experts=experts.flip(0)))
    found = router_stats(routings, 3, None)
    assert found.counts.tolist() == [[2, 1, 1], [2, 1, 1]]
    assert int(found.tokens) == 3
    assert found.dropped.tolist() == [0, 2]
    variances = [statistics.variance(row) for row in probs.tolist()]  # here the logits are the probabilities
    assert found.logit_variance.tolist() == pytest.approx([sum(variances)] * 2)
    assert found.entropy.tolist() == pytest.approx([sum(wanted)] * 2, abs=1e-6)
    masked = router_stats(routings, 3, torch.tensor([True, False, True]))
    assert masked.counts.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert int(masked.tokens) == 2
    assert masked.entropy.tolist() == pytest.approx([wanted[0] + wanted[2]] * 2, abs=1e-6)
    assert masked.logit_variance.tolist() == pytest.approx([variances[0] + variances[2]] * 2)
    assert router_stats((plain,), 3, None).dropped.tolist() == [0]
    assert count_assignments(experts, 3).tolist() == [2, 1, 1]
    assert count_assignments(experts, 3, torch.tensor([False, True, True])).tolist() == [1, 0, 1]
    both = found.add(masked)
    assert both.counts.tolist() == [[3, 2, 2], [3, 2, 2]]
    assert int(both.tokens) == 5


# ---- initial values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "scorer", "wanted"),
    [
        ("smoe", Linear.Config(), {"scorer.linear.weight": 0.05}),
        ("smoe", Linear.Config(init_std=0.3, bias=True), {"scorer.linear.weight": 0.3, "scorer.linear.bias": 0.0}),
        ("rmoe", Linear.Config(init_std="inverse_sqrt"), {"scorer.linear.weight": 128**-0.5}),
        ("smoe", MLP.Config(width=80), {"scorer.up.weight": 0.05, "scorer.up.bias": 0.0, "scorer.out.weight": 0.05}),
        (
            "smoe", Cosine.Config(width=90, embedding_init="normal"),
            {"scorer.embeddings": 0.01, "scorer.projection.weight": 0.05},
        ),
        (
            "smoe", Hypernetwork.Config(width=60),
            {"scorer.embedding": 1.0, "scorer.up.weight": 400**-0.5, "scorer.out.weight": (400 * 60) ** -0.5},
        ),
        ("noisy-topk", Linear.Config(), {"noise_map.weight": 0.0}),
        ("rmoe", Linear.Config(), {"recurrence.projector.weight": 0.05}),
        ("eda", EdaHead.Config(), {"scorer.fc1.weight": 0.05, "scorer.fc2.weight": 0.05, "scorer.out.weight": 0.05}),
    ],
)  # fmt: skip
def test_standard_deviations_at_the_start(row: str, scorer: Scorer.Config, wanted: dict[str, float]) -> None:
    """As each row's docstring says, in a model whose own is 0.05; of 16 x 400 numbers, to 10%."""
    from rmoe.model import initialize

    router = build_router(vary(resolve(row), scorer=scorer), Geometry(400, 16, 2, 2, 1, VOCAB, 0.05))
    router.config = type("Config", (), {"initializer_range": 0.05})()
    initialize(router, 1)
    tensors = router.state_dict()
    for name, std in wanted.items():
        assert float(tensors[name].double().std(correction=0)) == pytest.approx(std, rel=0.1), name
        assert abs(float(tensors[name].mean())) < 0.2 * std + 1e-9, name


def test_special_values_at_the_start() -> None:
    from rmoe.model import initialize

    def built(row: str, layer: int = 1, **stages: object):  # type: ignore[no-untyped-def]
        router = build_router(
            vary(resolve(row), **stages), Geometry(40, 8, find(row).top_k or 2, 2, layer, VOCAB)
        )
        router.config = type("Config", (), {"initializer_range": 0.02})()
        initialize(router, 1)
        return router

    xmoe = built("xmoe", scorer={"temperature": 0.25, "width": 16}).scorer
    gram = xmoe.embeddings @ xmoe.embeddings.T  # orthogonal rows of norm 0.32
    assert (gram - 0.32**2 * torch.eye(8)).abs().max() < 1e-5
    assert math.isclose(float(xmoe.log_inverse_temperature.exp()), 4.0, rel_tol=1e-6)
    half = built("stable-moe-onestage").scorer.centroids
    assert (half @ half.T - 0.01 * torch.eye(8)).abs().max() < 1e-6
    stable = built("stable-moe")
    assert (stable.centroids @ stable.centroids.T - 0.01 * torch.eye(8)).abs().max() < 1e-6
    assert float(stable.word_embeddings.std()) == pytest.approx(1.0, rel=0.1)
    assert float(stable.word_router.weight.std()) == pytest.approx(50**-0.5, rel=0.15)
    assert (built("eda").recurrence.cell.scale == 1).all()
    assert built("eda", layer=0).recurrence.cell.scale is None
    cell = build_shared(resolve("rmoe"), Geometry(40, 8, 2)).recurrence.cell
    cell.config = type("Config", (), {"initializer_range": 0.02})()
    initialize(cell, 1)
    for parameter in cell.parameters():  # uniform up to 1 / sqrt(p)
        assert 0.95 * 128**-0.5 < float(parameter.abs().max()) <= 128**-0.5
        assert abs(float(parameter.mean())) < 0.02
        assert float(parameter.std()) == pytest.approx(128**-0.5 / math.sqrt(3), rel=0.1)


def test_shared_scorers_by_group() -> None:
    """Two layers a group: layers 0 and 1 use the first, 2 and 3 the second, 4 the third."""
    spec = vary(resolve("smoe"), scorer=Linear.Config(shared_layers=2))
    sizes = Geometry(12, 6, 2, num_layers=5)
    shared = build_shared(spec, sizes)
    assert shared is not None
    assert len(shared.scorer.groups) == 3
    for i, group in enumerate(shared.scorer.groups):
        torch.nn.init.constant_(group.weight, i + 1.0)
    for layer, group in enumerate((0, 0, 1, 1, 2)):
        router = build_router(spec, replace(sizes, layer_index=layer))
        routing = router(torch.ones(1, 12), (), shared, RouterContext(1, 1))[0]
        assert routing.logits.tolist() == [[12.0 * (group + 1)] * 6]
        assert router.experts_matrix(shared) is shared.scorer.groups[group].weight
    assert (
        len(build_shared(vary(resolve("smoe"), scorer=Linear.Config(shared_layers=0)), sizes).scorer.groups)
        == 1
    )
    assert build_shared(resolve("smoe"), sizes) is None


# ---- what is refused: the values at both sides of each limit -----------------------------------------------

LIMITS = [
    (lambda v: Recurrence.Config(width=v), (1,), (0, -1)),
    (lambda v: Recurrence.Config(truncate_every=v), (1, None), (0,)),
    (lambda v: Recurrence.Config(truncate_every=2, carry=v), ("passed",), ("detached", "zero")),
    (lambda v: Linear.Config(shared_layers=v), (0, 1), (-1,)),
    (lambda v: Linear.Config(init_std=v), (1e-9, None, "inverse_sqrt"), (0.0, -1.0, "other", True)),
    (lambda v: MLP.Config(dropout=v), (0.0, 0.99), (1.0, -0.01)),
    (lambda v: MLP.Config(width=v), (1,), (0,)),
    (lambda v: Cosine.Config(width=v), (1, None), (0,)),
    (lambda v: Cosine.Config(temperature=v), (0.1,), (0.0,)),
    (lambda v: Hypernetwork.Config(width=v), (1,), (0,)),
    (lambda v: Softmax.Config(start_k=v), (1, None), (0,)),
    (lambda v: Sigmoid.Config(scale=v), (0.1,), (0.0,)),
    (lambda v: Sigmoid.Config(groups=2, top_groups=v), (1, 2), (0, 3)),
    (lambda v: ReLU.Config(growth=v), (1.01,), (1.0, 0.5)),
    (lambda v: ReLU.Config(start_weight=v), (1e-9,), (0.0,)),
    (lambda v: SparseMixer.Config(jitter=v), (0.01,), (0.0,)),
    (lambda v: Router.Config(input_jitter=v), (0.0, 0.99), (1.0, -0.1)),
    (lambda v: Stable.Config(stage1_share=v), (0.01, 0.99), (0.0, 1.0)),
    (lambda v: Stable.Config(embedding_width=v), (1,), (0,)),
    (lambda v: LoadBalance(weight=v), (0.0, None, 2), (-0.1,)),
    (lambda v: BalanceSpec(bias_update_rate=v), (0.0, 1), (-1e-3,)),
    (lambda v: BalanceSpec(capacity_factor=v), (0.1, None), (0.0,)),
    (
        lambda v: BalanceSpec(losses=v),
        ((), (ZLoss(), LoadBalance())),
        ((ZLoss(), ZLoss(weight=1.0)),),
    ),
    (lambda v: Temperature.Config(start=v), (0.1,), (0.0,)),
    (lambda v: Temperature.Config(end=v), (0.1, None), (0.0,)),
    (lambda v: Temperature.Config(target_entropy=v), (0.1,), (0.0,)),
    (lambda v: Temperature.Config(rate=v), (0.1,), (0.0,)),
    (lambda v: Recurrence.Config(cell="identity", carry=v), ("zero",), ("passed", "detached")),
]
SIZES = Geometry(12, 8, 4, 2, 0, VOCAB)


SIZE_LIMITS = [
    (lambda v: build_router(resolve("smoe"), replace(SIZES, top_k=v)), (1, 8), (0, 9)),
    (lambda v: build_router(vary(resolve("smoe"), gate=Softmax.Config(start_k=v)), SIZES), (4,), (5,)),
    (lambda v: build_router(vary(resolve("smoe"), gate=Sigmoid.Config(groups=v, top_groups=v)), SIZES), (1, 2, 4), (3, 8)),
    (lambda v: build_router(vary(resolve("smoe"), gate=Sigmoid.Config(groups=4, top_groups=v)), SIZES), (2, 3), (1,)),
    (lambda v: build_router(resolve("gshard"), replace(SIZES, top_k=v)), (2,), (1, 3)),
    (lambda v: build_router(resolve("sparsemixer"), replace(SIZES, top_k=v)), (2,), (1, 3)),
    (lambda v: build_router(resolve("stable-moe"), replace(SIZES, top_k=v)), (1,), (2,)),
    (lambda v: build_router(resolve("stable-moe"), replace(SIZES, top_k=1, vocab_size=v)), (1,), (0,)),
    (lambda v: build_router(resolve("hash"), replace(SIZES, vocab_size=v)), (1,), (0,)),
    (
        lambda v: build_router(vary(resolve("smoe"), temperature=Temperature.Config(target_entropy=v)), SIZES),
        (2.07,), (2.08, math.log(8)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "fine", "wrong"), LIMITS + SIZE_LIMITS)
def test_limits(make, fine: tuple, wrong: tuple) -> None:  # type: ignore[no-untyped-def]
    for value in fine:
        make(value)
    for value in wrong:
        with pytest.raises(RequestError):
            make(value)


def test_what_goes_together() -> None:
    with pytest.raises(RequestError, match=r"router\.gate is 'relu'; allowed: a gate that takes a bias"):
        vary(resolve("eda"), gate=ReLU.Config(), balance=BalanceSpec())
    with pytest.raises(RequestError, match=r"router\.scorer is None; allowed: set"):
        vary(resolve("smoe"), scorer=None)
    with pytest.raises(RequestError, match=r"router\.gate is .*; allowed: null with router hash"):
        RouterSpec(router=Hash.Config(), scorer=None)
    with pytest.raises(RequestError, match=r"router\.recurrence is "):
        RouterSpec(recurrence=Linear.Config())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scorer": {"kind": "linear", "width": 3}}, r"scorer\.width is 3; allowed: options of linear"),
        ({"scorer": {"kind": "none of them"}}, r"scorer\.kind is 'none of them'"),
        ({"scorer": {}}, r"scorer\.kind is None"),
        ({"scorer": "linear"}, r"scorer is 'linear'; allowed: an object with a 'kind'"),
        ({"scores": None}, r"router\.scores is None; allowed: one of router, recurrence"),
        ([], "router is .*; allowed: an object"),
        ({"scorer": {"kind": "linear", "bias": 1}}, r"scorer\.bias is 1; allowed: bool"),
        ({"gate": {"kind": "softmax", "start_k": 1.5}}, r"gate\.start_k is 1\.5; allowed: int or null"),
        ({"gate": {"kind": "softmax", "start_k": True}}, r"gate\.start_k is True"),
        ({"gate": {"kind": "softmax", "order": "x"}}, r"order is 'x'; allowed: 'softmax_topk' or 'topk_softmax'"),
        ({"gate": {"kind": "sigmoid", "scale": True}}, r"gate\.scale is True; allowed: float"),
        ({"gate": {"kind": "sigmoid", "scale": "1"}}, r"gate\.scale is '1'"),
        ({"balance": {"kind": "balance", "losses": [{"kind": "x"}]}}, r"loss\.kind is 'x'"),
        ({"balance": {"kind": "balance", "losses": ["z"]}}, "loss is 'z'"),
        ({"balance": {"kind": "balance", "losses": 3}}, r"balance\.losses is 3"),
        ({"balance": 3}, "balance is 3; allowed: an object"),
    ],
)  # fmt: skip
def test_json_that_is_refused(data: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RouterSpec.from_dict(data)


def test_json_that_is_read() -> None:
    assert RouterSpec.from_dict({}) == RouterSpec()
    assert RouterSpec.from_dict({"gate": {"kind": "sigmoid", "scale": 2}}).gate == Sigmoid.Config(scale=2)
    assert (
        RouterSpec.from_dict({"balance": {"kind": "balance", "capacity_factor": 2}}).balance.capacity_factor
        == 2
    )
    losses = {"balance": {"kind": "balance", "losses": [{"kind": "z", "weight": 1}]}}
    assert RouterSpec.from_dict(losses).balance.losses == (ZLoss(weight=1),)


PROPERTIES = {  # name: draws noise, may leave slots empty, is causal, has a shared module
    "smoe": (False, False, True, False),
    "smoe-mlp-mi": (True, False, True, False),
    "switch": (True, True, True, False),
    "gshard": (True, True, True, False),
    "noisy-topk": (True, False, True, False),
    "expert-choice": (False, True, False, False),
    "remoe": (False, True, True, False),
    "dynmoe": (False, True, True, False),
    "blockffn": (False, True, True, False),
    "deepseek-v3": (False, False, True, False),
    "sparsemixer": (True, False, True, False),
    "smoe-dropout": (False, True, True, False),
    "smoe-capacity": (False, True, True, False),
    "eda": (False, True, True, False),
    "eda-linear": (False, False, True, False),
    "hash": (False, False, True, False),
    "stable-moe": (False, False, True, False),
    "rmoe": (False, False, True, True),
    "rmoe-sproj": (False, False, True, True),
    "low-rank": (False, False, True, False),
    "path-moe": (False, False, True, True),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    """From the papers: what a model must know about a router before it is built, and what the routing then shows."""
    spec = resolve(name)
    shared = build_shared(spec, Geometry(12, 8, 2, 2)) is not None
    assert (spec.uses_noise, spec.leaves_empty_slots, spec.is_causal, shared) == PROPERTIES[name]


def test_options_are_changed_by_name() -> None:
    changed = with_options(
        resolve("rmoe"),
        ["recurrence.width=64", "recurrence.carry=zero", "balance.capacity_factor=1.5", "scorer.bias=true"],
    )
    assert changed == vary(
        RMOE,
        recurrence={"width": 64, "carry": "zero"},
        balance={"capacity_factor": 1.5},
        scorer={"bias": True},
    )
    assert with_options(changed, ["balance.capacity_factor=null"]).balance.capacity_factor is None
    assert with_options(RMOE, []) == RMOE
    assert with_options(resolve("hunyuan"), ["gate.layer_k=[2,1]"]) == vary(
        resolve("hunyuan"), gate={"layer_k": (2, 1)}
    )
    for wrong in (
        "recurrence.width",
        "width=3",
        "recurrence.depth=3",
        "router=3",
        "balance.losses=[]",
        "x.y=1",
    ):
        with pytest.raises(RequestError) as caught:
            with_options(RMOE, [wrong])
        assert str(caught.value).startswith(
            f"--router-option is '{wrong}'; allowed: NAME=VALUE, NAME one of "
        )
        assert "recurrence.width" in str(caught.value)
        assert "losses" not in str(caught.value).partition("allowed:")[2]
    with pytest.raises(RequestError, match=r"recurrence\.width is 'wide'; allowed: int"):
        with_options(RMOE, ["recurrence.width=wide"])
    with pytest.raises(RequestError, match="--router-option"):
        with_options(resolve("hash"), ["scorer.bias=true"])  # it has no scorer


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("deepseek-v3", "gate.scale=Infinity"), ("deepseek-v3", "gate.scale=NaN"), ("hunyuan", "gate.softcap=1e-300"),
        ("smoe", "scorer.init_std=Infinity"), ("smoe", "temperature.start=1e-300"),
        ("noisy-topk", "router.load_weight=NaN"), ("noisy-topk", "router.importance_weight=-Infinity"),
        ("rmoe-np-r0.5", "router.scale=NaN"), ("stable-moe", "router.balance_weight=Infinity"),
        ("remoe", "gate.start_weight=1e300"), ("hash", "router.table_seed=99999999999999999999"),
    ],
)  # fmt: skip
def test_what_a_tensor_cannot_hold_is_refused(row: str, change: str) -> None:
    with pytest.raises(RequestError, match=f"{change.partition('=')[0]} is"):
        with_options(resolve(row), [change])


def test_balance_of_null_experts_without_any_is_that_of_the_others() -> None:
    probs = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    experts = probs.topk(2).indices
    counts = torch.bincount(experts.flatten(), minlength=4)[None]
    view = LossView(probs.log(), probs, experts, experts, RouterContext(1, 6), counts, 4, 2, [None])
    torch.testing.assert_close(NullBalance()(view), LoadBalance()(view))


@pytest.mark.parametrize("row", ["quantile-balance", "noisy-topk"])
def test_a_layers_own_k_is_what_its_state_and_loss_follow(row: str) -> None:
    """`gate.layer_k` of one, where the model's k is two: all as with a model's k of one."""
    x, found = inputs(64), []
    for layer_k, top_k in (((1,), 2), ((), 1)):
        spec = vary(resolve(row), gate=TopK.Config(choose_by="logits", layer_k=layer_k))
        routing = layer_of(spec, 0, top_k=top_k).train()(x, (), None, RouterContext(1, 64, noise=noise()))[0]
        found.append((routing.observed, routing.penalty))
    for own, models in zip(*found, strict=True):
        assert (own is None) == (models is None)
        if own is not None:
            torch.testing.assert_close(own, models)
    assert found[0] != (None, None)


@pytest.mark.parametrize("loss", [GateEntropy(), MutualInformation()])
@pytest.mark.parametrize("mask", [None, torch.zeros(2, dtype=torch.bool)], ids=["real", "all padding"])
def test_losses_of_entropies_have_a_gradient_at_zero_probabilities(loss: Loss, mask: Tensor | None) -> None:
    probs = torch.tensor([[[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]], requires_grad=True)  # [L, T, C]
    experts, counts = torch.zeros(1, 2, 1, dtype=torch.int64), torch.tensor([[2, 0, 0]])
    view = LossView(probs, probs, experts, experts, RouterContext(1, 2, mask), counts, 3, 1, [None])
    loss(view).sum().backward()
    assert probs.grad is not None
    assert probs.grad.isfinite().all()
    if mask is None:
        entropies = [0.0, -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
        mean = sum(entropies) / 2
        marginal = -sum(p * math.log(p) for p in (0.625, 0.375))
        want = mean - marginal if isinstance(loss, MutualInformation) else mean
        assert loss(view).item() == pytest.approx(want, abs=1e-6)


def test_gshards_capacity_is_its_sources() -> None:
    router = build_router(resolve("gshard"), Geometry(16, 8, 2)).eval()
    hidden = torch.ones(64, 16)  # all want the same two experts
    routing, _ = router(hidden, (), None, RouterContext(1, 64))
    assert routing.dropped is not None
    kept = count_assignments(routing.experts.masked_fill(routing.dropped, 8), 8)
    assert kept.max() == 2 * math.ceil(64 / 8)  # arXiv:2006.16668, as transformers' NLLB-MoE has it


def test_uniform_deals_among_real_tokens_wherever_the_padding_is() -> None:
    router = build_router(resolve("uniform"), Geometry(16, 4, 2))
    for mask in (torch.tensor([1, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 0, 1, 0, 1])):
        routing, _ = router(torch.zeros(5, 16), (), None, RouterContext(1, 5, mask.bool()))
        assert routing.experts[mask.bool()].tolist() == [[0, 1], [2, 3], [0, 1]]


def test_noise_learned_per_expert_knows_no_skip_class() -> None:
    spec = replace(resolve("noisy-topk"), scorer=EdaHead.Config())
    with pytest.raises(
        RequestError, match=r"router\.kind is 'noisy_topk'; allowed: staged, with a skip class"
    ):
        build_router(spec, Geometry(16, 8, 2))


def test_a_quota_per_group_needs_a_fixed_k() -> None:
    for more in ({"layer_k": (2, 4)}, {"start_k": 2}):
        with pytest.raises(RequestError, match=r"gate\.group_quota is True; allowed: false with"):
            TopK.Config(groups=2, group_quota=True, **more)


def test_a_decision_can_be_moved_whole() -> None:
    routing, _ = build_router(resolve("smoe-capacity"), Geometry(16, 4, 2))(
        torch.randn(6, 16), (), None, RouterContext(1, 6)
    )
    assert on_device([routing], torch.device("cpu"))[0] is routing
    (moved,) = on_device([routing], torch.device("meta"))
    assert {part.device.type for part in moved if part is not None} == {"meta"}
    assert [part is None for part in moved] == [part is None for part in routing]
