"""Each measure on routing whose answer is known, or against the definition written out as a loop."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmoe.analysis.coactivation import Coactivation
from rmoe.analysis.confidence import MAX_LOG_RATIO, GateConfidence, log_inner_balance
from rmoe.analysis.histogram import StreamingHistogram
from rmoe.analysis.load import Load, capacity, frequency, load_imbalance
from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.analysis.paths import FrequentPaths
from rmoe.analysis.saturation import Saturation, shared_choice
from rmoe.analysis.token_affinity import TokenAffinity, tracked_tokens
from rmoe.analysis.weights import mean_pairwise_cosine, norm_and_std, random_similarity
from rmoe.moe.records import RoutingBatch
from rmoe.routing.contract import gate_entropy
from tests.analysis.random_routing import random_routing, split

L, T, E, K = 3, 500, 6, 2


@pytest.fixture
def batch() -> RoutingBatch:
    return random_routing(L, T, E, K)


class TestHistogram:
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 5))
    @settings(deadline=None)
    def test_a_median_is_off_by_at_most_half_a_bin(self, values: list[float], parts: int) -> None:
        histogram = StreamingHistogram(1, 0.0, 1.0, 1000)
        for part in torch.tensor([values], dtype=torch.float64).chunk(parts, dim=1):
            histogram.update(part)
        (median,), overall = histogram.medians()
        assert median == overall == pytest.approx(np.median(values), abs=0.5e-3 + 1e-12)
        assert histogram.n == len(values)

    def test_layers_are_apart_and_pooled(self) -> None:
        histogram = StreamingHistogram(2, 0.0, 10.0, 10_000)
        low, high = torch.linspace(0, 1, 101), torch.linspace(8, 9, 101)
        histogram.update(torch.stack([low, high]))
        medians, overall = histogram.medians()
        np.testing.assert_allclose(medians, [0.5, 8.5], atol=5e-4)
        assert overall == pytest.approx(
            np.median(torch.cat([low, high]).numpy()), abs=5.1e-4
        )  # between 1 and 8

    def test_values_outside_count_in_the_outermost_bins(self) -> None:
        histogram = StreamingHistogram(1, 0.0, 1.0, 4)
        histogram.update(torch.tensor([[-5.0, 0.0, 0.25, 0.999, 1.0, 7.0]]))
        assert histogram.counts.tolist() == [[2, 1, 0, 3]]


class TestConfidence:
    def test_a_one_hot_gate_has_entropy_zero_and_a_uniform_one_ln_e(self) -> None:
        assert torch.equal(gate_entropy(torch.eye(E)), torch.zeros(E))
        torch.testing.assert_close(gate_entropy(torch.full((1, E), 1 / E)), torch.tensor([math.log(E)]))

    def test_one_expert_alone(self) -> None:
        confidence = GateConfidence(1, 1)
        confidence.update(
            RoutingBatch(torch.ones(1, 3, 1), torch.zeros(1, 3, 1).long(), torch.ones(1, 3, 1), 1)
        )
        assert confidence.entropy.counts[0].nonzero().tolist() == [[0]]
        assert np.diff(confidence.entropy.edges).min() > 0  # a density is drawn over them
        assert confidence.log_inner.medians()[1] == pytest.approx(MAX_LOG_RATIO, abs=5e-4)

    def test_inner_balance_is_the_ratio_of_the_two_largest(self) -> None:
        probs = torch.tensor([[0.1, 0.6, 0.3], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        expected = [math.log(2), 0.0, MAX_LOG_RATIO, 0.0]
        torch.testing.assert_close(log_inner_balance(probs), torch.tensor(expected))

    def test_streamed_against_numpy(self, batch: RoutingBatch) -> None:
        confidence = GateConfidence(L, E)
        for part in split(batch, [100, 1, 399]):
            confidence.update(part)
        probs = batch.probs.double().numpy()
        entropy = -(probs * np.log(probs)).sum(-1)
        np.testing.assert_allclose(confidence.entropy_sum.numpy() / T, entropy.mean(-1), rtol=1e-6)
        edges = confidence.entropy.edges
        for layer in range(L):
            expected = np.histogram(entropy[layer], bins=edges)[0]
            assert (
                np.abs(confidence.entropy.counts[layer].numpy() - expected).sum() <= 2
            )  # float32 at an edge
        ordered = np.sort(probs, axis=-1)
        ratio = ordered[..., -1] / ordered[..., -2]
        medians, overall = confidence.log_inner.medians()
        np.testing.assert_allclose(np.exp(medians), np.median(ratio, axis=-1), rtol=3e-4)
        assert np.exp(overall) == pytest.approx(np.median(ratio), rel=3e-4)
        mass = ordered[..., -K:].sum(-1)
        np.testing.assert_allclose(confidence.outer.medians()[0], np.median(mass, axis=-1), atol=6e-5)

    def test_a_skip_class_counts_in_entropy_and_in_what_was_chosen(self) -> None:
        """Three experts and a skip class; the one token chooses the skip."""
        probs = torch.tensor([[[0.1, 0.1, 0.2, 0.6]]])
        skipping = RoutingBatch(probs, torch.tensor([[[3]]]), torch.zeros(1, 1, 1), 3)
        confidence = GateConfidence(1, 4)
        confidence.update(skipping)
        assert confidence.entropy_sum.item() == pytest.approx(
            -(0.2 * math.log(0.1) + 0.2 * math.log(0.2) + 0.6 * math.log(0.6))
        )
        assert confidence.outer.medians()[1] == pytest.approx(0.6, abs=1e-4)
        load = Load(1, 3, 1, 1)
        load.update(skipping.experts)
        assert load.total_counts().sum() == 0
        assert skipping.first_choice().item() == 3


class TestLoad:
    def test_balanced_is_one_and_collapsed_is_e(self) -> None:
        assert load_imbalance(np.full(E, 7)) == pytest.approx(1)
        assert load_imbalance(np.eye(E)[0] * 9) == pytest.approx(E)
        np.testing.assert_allclose(frequency(np.array([1, 3])), [0.25, 0.75])
        assert (frequency(np.zeros(4)) == 0).all()

    def test_counts_and_drops_against_a_loop_in_token_order(self, batch: RoutingBatch) -> None:
        window, factors = 64, (1.0, 1.3)
        load = Load(L, E, K, T, factors, window)
        for part in split(batch, [10, 200, 290]):
            load.update(part.experts)
        experts = batch.experts.numpy()
        counts = np.stack([np.bincount(layer.reshape(-1), minlength=E) for layer in experts])
        assert np.array_equal(load.total_counts(), counts)
        ratios, overall = load.drop_ratio()
        for f, factor in enumerate(factors):
            dropped = np.zeros(L)
            for start in range(0, T - window + 1, window):
                for layer in range(L):
                    room = np.full(E, math.ceil(factor * window * K / E))
                    for token in range(start, start + window):
                        for expert in experts[layer, token]:
                            room[expert] -= 1
                            dropped[layer] += room[expert] < 0
            whole = T // window * window * K
            np.testing.assert_allclose(ratios[f], dropped / whole)
            assert overall[f] == pytest.approx(dropped.sum() / (whole * L))
        assert ratios[0].min() > 0

    def test_a_text_shorter_than_a_window_is_one_window(self, batch: RoutingBatch) -> None:
        load = Load(L, E, K, T, window_tokens=4096)
        load.update(batch.experts)
        assert load.window_tokens == T
        counts = load.total_counts()
        expected = np.clip(counts - capacity(1.0, T, K, E), 0, None).sum(-1) / (T * K)
        np.testing.assert_allclose(load.drop_ratio()[0][0], expected)

    def test_one_expert_doing_everything_drops_all_beyond_its_share(self) -> None:
        experts = torch.zeros(1, 100, 1, dtype=torch.int64)
        load = Load(1, 4, 1, 100, (1.0,))
        load.update(experts)
        assert load.drop_ratio()[1][0] == pytest.approx(0.75)


def test_coactivation_against_a_loop(batch: RoutingBatch) -> None:
    empty = batch.experts.clone()
    empty[1, ::7, 1] = E  # some tokens have one expert only
    batch = batch._replace(experts=empty)
    measure = Coactivation(L, E)
    for part in split(batch, [123, 377]):
        measure.update(part.experts)
    within, across = np.zeros((L, E, E)), np.zeros((L - 1, E, E))
    for token in range(T):
        for layer in range(L):
            here = [e for e in batch.experts[layer, token].tolist() if e < E]
            above = [e for e in batch.experts[layer + 1, token].tolist() if e < E] if layer + 1 < L else []
            for a in here:
                within[layer, a, here] += 1
                if above:
                    across[layer, a, above] += 1
    np.testing.assert_allclose(measure.within(), within / T)
    np.testing.assert_allclose(measure.across(), across / T)


class TestPaths:
    def test_exact_while_they_fit(self, batch: RoutingBatch) -> None:
        paths = FrequentPaths(L, E + 1)
        first = batch.first_choice()
        for part in first.split([77, 423], dim=1):
            paths.update(part)
        expected = Counter(map(tuple, first.T.tolist()))
        assert paths.distinct == len(expected)
        assert paths.max_undercount == 0
        ranked = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:10]
        assert paths.top(10) == [(list(path), count) for path, count in ranked]

    def test_bounded_memory_never_misses_a_frequent_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two paths stand out of 20,000 others; 64 counters find them, within the stated bound."""
        monkeypatch.setattr("rmoe.analysis.paths._BUFFER_TOKENS", 512)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 50, (30_000, 4))
        tokens[::20] = [1, 2, 3, 4]
        tokens[7::30] = [4, 3, 2, 1]
        exact = Counter(map(tuple, tokens.tolist()))
        paths = FrequentPaths(4, 51, capacity=64)
        for part in torch.from_numpy(tokens).T.split(1000, dim=1):
            paths.update(part)
            assert len(paths._keys) <= 64
        assert 0 < paths.max_undercount <= 30_000 / 65
        assert 400 < paths.distinct <= len(exact)  # of 512 tokens at once nearly all differ
        top = paths.top(2)
        assert [path for path, _ in top] == [[1, 2, 3, 4], [4, 3, 2, 1]]
        for path, count in paths.top(64):
            assert exact[tuple(path)] - paths.max_undercount <= count <= exact[tuple(path)]

    def test_hashed_keys_count_the_same(self) -> None:
        """30 layers of 128 experts do not fit 64 bits; few distinct paths, so counts are known."""
        rng = np.random.default_rng(1)
        pool = rng.integers(0, 128, (300, 30))
        tokens = pool[rng.integers(0, 300, 5000)]
        paths = FrequentPaths(30, 129)
        paths.update(torch.from_numpy(tokens).T)
        exact = Counter(map(tuple, tokens.tolist()))
        assert paths.distinct == len(exact)
        assert {tuple(path): count for path, count in paths.top(300)} == exact


class TestTokenAffinity:
    def test_against_a_counter(self, batch: RoutingBatch) -> None:
        ids = torch.randint(0, 40, (T,), generator=torch.Generator().manual_seed(5))
        affinity = TokenAffinity(L, E, 40, tracked_tokens(np.bincount(ids, minlength=40), L, E))
        for part, part_ids in zip(split(batch, [50, 450]), ids.split([50, 450]), strict=True):
            affinity.update(part.experts, part_ids)
        top = affinity.top(4)
        for layer in range(L):
            for expert in range(E):
                taken = (batch.experts[layer] == expert).any(-1)
                exact = Counter(ids[taken].tolist())
                ranked = sorted(exact.items(), key=lambda item: (-item[1], item[0]))[:4]
                assert [(i, count) for i, count, _ in top[layer][expert]] == ranked
                total = sum(exact.values())
                assert [share for *_, share in top[layer][expert]] == pytest.approx(
                    [c / total for _, c in ranked]
                )

    def test_a_large_vocabulary_keeps_the_most_frequent_ids(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rmoe.analysis.token_affinity.MAX_TABLE", 2 * 3 * 4)
        counts = np.array([0, 5, 1, 9, 0, 7, 5])
        ids = tracked_tokens(counts, num_layers=2, num_experts=2)  # 2 * 3 * (ids + 1) <= 24
        assert ids.tolist() == [1, 3, 5]
        affinity = TokenAffinity(2, 2, 7, ids)
        text = torch.tensor([1, 1, 2, 3, 6])
        routing = RoutingBatch(
            torch.tensor([0.9, 0.1]).expand(2, 5, 2),
            torch.zeros(2, 5, 1, dtype=torch.int64),
            torch.ones(2, 5, 1),
            2,
        )
        affinity.update(routing.experts, text)
        assert affinity.top(3)[0] == [[(1, 2, 0.4), (3, 1, 0.2)], []]  # shares of all 5, the uncounted too


class TestSaturation:
    def test_same_disjoint_and_half(self) -> None:
        one = torch.tensor([[0, 1], [0, 1], [0, 1], [E, E], [0, E], [E, E]])
        two = torch.tensor([[1, 0], [2, 3], [1, 2], [E, E], [0, 1], [2, E]])
        assert shared_choice(one, two, E).tolist() == [1.0, 0.0, 0.5, 1.0, 0.5, 0.0]

    def test_independent_choices_share_k_over_e(self) -> None:
        a, b = random_routing(2, 20_000, E, K, seed=1), random_routing(2, 20_000, E, K, seed=2)
        saturation = Saturation(2)
        for x, y in zip(split(a, [5000, 15_000]), split(b, [5000, 15_000]), strict=True):
            saturation.update(x.experts, y.experts, E)
        np.testing.assert_allclose(saturation.result(), K / E, atol=0.01)
        assert saturation.n == 20_000


class TestWeights:
    def test_mean_pairwise_cosine_against_all_pairs(self) -> None:
        vectors = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
        cosine = torch.nn.functional.cosine_similarity(
            vectors[:, None].double(), vectors[None].double(), dim=-1
        )
        assert mean_pairwise_cosine(vectors) == pytest.approx((cosine.sum() - 7).item() / 42)
        assert mean_pairwise_cosine(vectors[:1].expand(5, -1)) == pytest.approx(1)

    def test_random_experts_are_unlike_each_other(self) -> None:
        reference = random_similarity(8, [64, 64, 64], seed=0)
        assert abs(reference) < 4 * math.sqrt(2 / (8 * 7 * 192 * 16))
        assert random_similarity(8, [64, 64, 64], seed=0) == reference

    def test_norm_and_std(self) -> None:
        norm, std = norm_and_std(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        assert norm == pytest.approx(5)
        assert std == pytest.approx(np.std([3, 4, 0, 0]))


def _tensors(value: object, seen: set[int]) -> int:
    """Bytes of all tensors and arrays reachable from an object's attributes."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, list | tuple):
        return sum(_tensors(item, seen) for item in value)
    if type(value).__module__.startswith("rmoe."):
        return sum(_tensors(item, seen) for item in vars(value).values())
    return 0


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmoe.analysis.paths._BUFFER_TOKENS", 256)
    counts = np.full(64, 100 * T // 64)
    measures = RoutingMeasures(Sizes(L, E, K, E), counts, explored_tokens=32)
    held = []
    for step in range(12):
        measures.update(random_routing(L, T, E, K, seed=step), torch.arange(T) % 64)
        held.append(_tensors(measures, set()))
    # All (E + 1)^L = 343 paths may turn up; from then on nothing grows.
    assert held[-1] == held[6]
    assert held[-1] - held[0] <= (E + 1) ** L * (8 + 8 + 4 * L)


def test_every_figure_is_the_same_whatever_the_batches(batch: RoutingBatch) -> None:
    ids = torch.arange(T) % 17
    results = []
    for sizes in ([T], [1, 99, 300, 100]):
        measures = RoutingMeasures(Sizes(L, E, K, E), np.bincount(ids), explored_tokens=150)
        for part, part_ids in zip(split(batch, sizes), ids.split(sizes), strict=True):
            measures.update(part, part_ids)
        results.append(measures.fields(str))
    whole, parts = results
    for name in whole:
        if name not in ("mi_digitised", "entropy_mean"):
            assert whole[name] == parts[name], name
    np.testing.assert_allclose(whole["mi_digitised"].values, parts["mi_digitised"].values, rtol=1e-12)
    np.testing.assert_allclose(whole["entropy_mean"].values, parts["entropy_mean"].values, rtol=1e-6)


def test_the_explorer_shows_the_first_tokens_with_the_largest_weight_first(batch: RoutingBatch) -> None:
    experts, weights = batch.experts.clone(), batch.weights.clone()
    experts[:, 0, 0], weights[:, 0, 0] = E, 0.0  # the first token's better slot is empty
    weights[1, 1] = torch.tensor([0.2, 0.8])
    measures = RoutingMeasures(Sizes(L, E, K, E), np.bincount(torch.arange(T)), explored_tokens=3)
    measures.update(batch._replace(experts=experts, weights=weights), torch.arange(T))
    tokens = measures.fields(lambda i: f"<{i}>")["tokens"]
    assert [token.text for token in tokens] == ["<0>", "<1>", "<2>"]
    assert tokens[0].experts == [[experts[layer, 0, 1].item()] for layer in range(L)]
    assert tokens[1].experts[1] == experts[1, 1].flip(0).tolist()
    assert tokens[1].weights[1] == pytest.approx([0.8, 0.2])
    assert tokens[2].experts[0] == experts[0, 2].tolist()
