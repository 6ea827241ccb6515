"""Against scikit-learn, and against what is known without computing."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

from rmoe.analysis.mutual_information import (
    NUM_BINS,
    ChosenMutualInformation,
    DigitisedMutualInformation,
    digitise,
    digitised_mutual_information,
    entropy_of_counts,
    mutual_information_of_counts,
)

INNER_EDGES = np.linspace(0, 1, NUM_BINS + 1)[1:-1]


def _probabilities(layers: int, classes: int, tokens: int, seed: int = 0, spread: float = 0.3) -> np.ndarray:
    """[L, C, T] float32, sparse enough that bins differ."""
    draws = np.random.default_rng(seed).dirichlet(np.full(classes, spread), size=(layers, tokens))
    return np.ascontiguousarray(draws.transpose(0, 2, 1), dtype=np.float32)


@given(arrays(np.float32, st.integers(1, 50), elements=st.floats(0, 1, width=32)))
def test_digitise_is_numpys(values: np.ndarray) -> None:
    assert np.array_equal(digitise(values), np.digitize(values, INNER_EDGES))


def test_digitise_at_and_beside_every_edge() -> None:
    edges = np.linspace(0, 1, NUM_BINS + 1)
    for values in (edges, np.nextafter(edges, 0)[1:], np.nextafter(edges, 2)[:-1]):
        assert np.array_equal(digitise(values), np.digitize(values, INNER_EDGES))
        single = np.clip(values.astype(np.float32), 0, 1)
        assert np.array_equal(digitise(single), np.digitize(single, INNER_EDGES))
    assert digitise(np.array(1.0)) == NUM_BINS - 1


@pytest.mark.parametrize("classes", [2, 5, 8, 16, 17, 33, 64, 65, 130])
def test_equals_scikit_learn_token_by_token(classes: int) -> None:
    probs = _probabilities(layers=4, classes=classes, tokens=12)
    probs[0, :, 0] = np.eye(classes, dtype=np.float32)[1]  # a one-hot gate
    probs[1, :, 1] = 1 / classes  # a uniform one
    ours = digitised_mutual_information(probs)
    bins = np.digitize(probs, INNER_EDGES)
    for i, j, t in np.ndindex(ours.shape):
        assert ours[i, j, t] == pytest.approx(mutual_info_score(bins[i, :, t], bins[j, :, t]), abs=1e-9)


def test_many_tokens_in_chunks_equal_one_at_a_time() -> None:
    probs = _probabilities(layers=8, classes=16, tokens=700)
    whole = digitised_mutual_information(probs)
    single = np.concatenate(
        [digitised_mutual_information(probs[..., t : t + 1]) for t in range(700)], axis=-1
    )
    np.testing.assert_allclose(whole, single, atol=1e-13)


@given(st.integers(0, 10_000), st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_bounds_symmetry_and_relabelling(seed: int, classes: int) -> None:
    probs = _probabilities(layers=3, classes=classes, tokens=4, seed=seed)
    information = digitised_mutual_information(probs)
    entropy = information[np.arange(3), np.arange(3)]  # I(X; X) = H(X)
    np.testing.assert_array_equal(information, information.transpose(1, 0, 2))
    assert (information >= 0).all()
    assert (information <= np.minimum(entropy[:, None], entropy[None]) + 1e-12).all()
    permuted = probs[:, np.random.default_rng(seed).permutation(classes)]
    np.testing.assert_allclose(digitised_mutual_information(permuted), information, atol=1e-12)


def test_identical_routers_share_their_entropy_and_a_uniform_one_shares_nothing() -> None:
    probs = _probabilities(layers=1, classes=16, tokens=50)
    uniform = np.full_like(probs, 1 / 16)
    information = digitised_mutual_information(np.concatenate([probs, probs, uniform]))
    counts = np.stack([[np.bincount(column, minlength=NUM_BINS) for column in digitise(probs[0]).T]])[0]
    np.testing.assert_allclose(information[0, 1], entropy_of_counts(counts), atol=1e-12)
    np.testing.assert_allclose(information[:, 2], 0, atol=1e-12)


@pytest.mark.parametrize(("total", "limit"), [(1000, 100), (1000, 999), (997, 10), (40, 100), (7, 7)])
def test_the_sample_is_evenly_spaced_whatever_the_batches(total: int, limit: int) -> None:
    """Each token's own figure is told apart by its place, so the mean betrays which tokens were taken."""
    probs = torch.from_numpy(_probabilities(layers=2, classes=6, tokens=total)).transpose(1, 2)
    expected = [i * total // min(total, limit) for i in range(min(total, limit))]
    assert len(set(expected)) == len(expected)
    want = digitised_mutual_information(probs.transpose(1, 2).numpy())[..., expected].mean(-1)
    for sizes in ([total], [1] * total, [total // 3, total // 2, total - total // 3 - total // 2]):
        stream = DigitisedMutualInformation(2, total, limit)
        for part in probs.split(sizes, dim=1):
            stream.update(part)
        assert stream.n == len(expected)
        np.testing.assert_allclose(stream.result(), want, rtol=1e-12)


def test_chance_is_the_expected_information_of_relabelled_layers() -> None:
    """Against scikit-learn's closed form, for one token seen 4,000 times."""
    probs = _probabilities(layers=2, classes=8, tokens=1, seed=3)
    bins = digitise(probs)[..., 0]
    contingency = contingency_matrix(bins[0], bins[1], sparse=True)
    expected = expected_mutual_information(contingency, 8)
    stream = DigitisedMutualInformation(2, 4000)
    stream.update(torch.from_numpy(probs).transpose(1, 2).expand(2, 4000, 8))
    assert 0 < expected < stream.result()[0, 0]
    assert stream.chance()[0, 1] == pytest.approx(expected, abs=0.01)
    assert stream.chance()[0, 0] == pytest.approx(stream.result()[0, 0])  # the entropy knows no labels


def test_independent_layers_show_chance_and_no_more() -> None:
    probs = torch.from_numpy(_probabilities(layers=2, classes=16, tokens=5000)).transpose(1, 2)
    stream = DigitisedMutualInformation(2, 5000)
    stream.update(probs)
    assert stream.result()[0, 1] > 0.5  # far from zero all the same
    assert stream.result()[0, 1] == pytest.approx(stream.chance()[0, 1], abs=0.01)
    same = DigitisedMutualInformation(2, 5000)
    same.update(probs[:1].expand(2, -1, -1))
    assert same.result()[0, 1] > same.chance()[0, 1] + 0.3


@pytest.mark.parametrize(("total", "every"), [(997, 10), (40, 8), (1000, 1)])
def test_chance_is_the_same_whatever_the_batches(
    total: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmoe.analysis.mutual_information.CHANCE_TOKENS", total // every)
    probs = torch.from_numpy(_probabilities(layers=2, classes=6, tokens=total)).transpose(1, 2)
    chances = []
    for sizes in ([total], [1] * total, [total // 3, total // 2, total - total // 3 - total // 2]):
        stream = DigitisedMutualInformation(2, total)
        for part in probs.split(sizes, dim=1):
            stream.update(part)
        chances.append(stream.chance())
        assert stream._chance_n == -(-total // every)
    np.testing.assert_allclose(chances[1], chances[0], rtol=1e-12)
    np.testing.assert_allclose(chances[2], chances[0], rtol=1e-12)


def test_chosen_experts_of_identical_routers_share_their_entropy() -> None:
    choice = torch.randint(0, 8, (1, 5000), generator=torch.Generator().manual_seed(0))
    measure = ChosenMutualInformation(3, 9)
    for part in torch.cat([choice, choice, (choice + 3) % 8]).split(900, dim=1):  # the third: relabelled
        measure.update(part)
    result = measure.result()
    counts = np.bincount(choice[0], minlength=8)
    entropy = entropy_of_counts(counts) + 7 / (2 * 5000)
    np.testing.assert_allclose(result, np.full((3, 3), entropy), rtol=1e-12)
    assert measure.n == 5000


def test_chosen_experts_of_independent_routers_share_nothing_within_the_error() -> None:
    """Over 60 draws the plug-in estimate is off by about (A - 1)(B - 1) / 2n; the corrected one is not."""
    rng = np.random.default_rng(0)
    n, experts = 2000, 8
    plug_in, corrected = [], []
    for _ in range(60):
        x, y = rng.integers(0, experts, (2, n))
        joint = np.zeros((experts, experts))
        np.add.at(joint, (x, y), 1)
        plug_in.append(mutual_info_score(x, y))
        h = (
            entropy_of_counts(joint.sum(0))
            + entropy_of_counts(joint.sum(1))
            - entropy_of_counts(joint.reshape(-1))
        )
        assert h == pytest.approx(plug_in[-1], abs=1e-12)
        corrected.append(h + (2 * (experts - 1) - (experts**2 - 1)) / (2 * n))
        assert mutual_information_of_counts(joint) == pytest.approx(max(corrected[-1], 0), abs=1e-12)
    bias = (experts - 1) ** 2 / (2 * n)
    assert np.mean(plug_in) == pytest.approx(bias, rel=0.1)
    assert abs(np.mean(corrected)) < bias / 20


def test_chosen_experts_against_scikit_learn_with_a_known_dependence() -> None:
    """Y is X with probability 0.7, else uniform: I = ln E - H(Y|X)."""
    rng = np.random.default_rng(1)
    n, experts = 50_000, 4
    x = rng.integers(0, experts, n)
    y = np.where(rng.random(n) < 0.7, x, rng.integers(0, experts, n))
    measure = ChosenMutualInformation(2, experts)
    measure.update(torch.from_numpy(np.stack([x, y])))
    row = np.full(experts, 0.3 / experts)
    row[0] += 0.7
    truth = math.log(experts) + (row * np.log(row)).sum()
    assert measure.result()[0, 1] == pytest.approx(truth, abs=0.01)
    assert measure.result()[0, 1] == pytest.approx(mutual_info_score(x, y), abs=2e-4)


def test_at_least_200_times_faster_than_the_loop() -> None:
    """8 layers, 16 experts; the margin is so wide (see benchmarks/) that a busy machine does not matter."""
    probs = _probabilities(layers=8, classes=16, tokens=2000)
    bins = digitise(probs[..., :3])
    digitised_mutual_information(probs[..., :10])

    start = time.perf_counter()
    for i in range(8):
        for j in range(i, 8):
            for t in range(3):
                mutual_info_score(bins[i, :, t], bins[j, :, t])
    loop = (time.perf_counter() - start) / 3
    start = time.perf_counter()
    digitised_mutual_information(probs)
    ours = (time.perf_counter() - start) / 2000
    assert loop > 200 * ours


def test_one_layer_has_the_entropy_of_its_choice() -> None:
    chosen = ChosenMutualInformation(1, 3)
    chosen.update(torch.tensor([[0, 1] * 4000]))
    assert chosen.result().shape == (1, 1)
    assert chosen.result()[0, 0] == pytest.approx(np.log(2), abs=1e-3)


def test_a_pair_does_not_depend_on_the_size_of_a_third_layer() -> None:
    """Two layers of 4 experts and a null class, alone and beside one of 16: its further experts are not theirs."""
    small, large = _probabilities(2, 5, 400), _probabilities(1, 17, 400, seed=1)
    wide = np.zeros((3, 17, 400), np.float32)
    wide[:2, :4], wide[:2, 16:], wide[2:] = small[:, :4], small[:, 4:], large
    alone, beside = (
        DigitisedMutualInformation(2, 400),
        DigitisedMutualInformation(3, 400, layer_experts=(4, 4, 16)),
    )
    alone.update(torch.from_numpy(small).transpose(1, 2))
    beside.update(torch.from_numpy(wide).transpose(1, 2))
    np.testing.assert_array_equal(beside.result()[:2, :2], alone.result())
    np.testing.assert_array_equal(beside.chance()[:2, :2], alone.chance())
    assert beside.result()[2, 2] == digitised_mutual_information(large)[0, 0].mean()
    pair = digitised_mutual_information(wide[[0, 2]])[0, 1].mean()
    assert beside.result()[0, 2] == beside.result()[2, 0] == pytest.approx(pair, abs=1e-12)
