"""The reference lines: posteriors against enumeration, best experts against brute force, both against draws."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from rmoe.probes.oracle import BestExperts
from rmoe.probes.suite import PROBES
from rmoe.probes.world import CONTENT, World
from rmoe.results.probes import Knobs
from tests.probes.worlds import paths, posteriors

EIGHT = ["lookup", "carry", "integrate", "overwrite", "compose", "zipf", "late", "decoy"]


def test_the_suite_is_these_eight() -> None:
    assert list(PROBES) == EIGHT


@pytest.mark.parametrize("probe", EIGHT)
def test_posteriors_equal_enumeration(probe: str) -> None:
    knobs = Knobs(layers=3, experts=4)
    w = World(probe, 5, knobs, torch.float64)
    evidence = w.evidence(w.tokens(7, "check").inputs) / 10  # flatter, so that no posterior is a plain 0 or 1
    alone, so_far = w.chain.posterior(evidence)
    for t in range(7):
        prior, want_alone, want_so_far = posteriors(probe, 4, evidence[:, t].tolist())
        for got, want in ((w.chain.prior(), prior), (alone[:, t], want_alone), (so_far[:, t], want_so_far)):
            assert (got - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("probe", EIGHT)
def test_draws_follow_the_definition(probe: str) -> None:
    """Each way a token can come about is drawn as often as it should, within 4.5 standard errors."""
    knobs, count = Knobs(layers=3, experts=3), 40_000
    shown, asked = World(probe, 1, knobs).chain.draw(count, torch.Generator().manual_seed(3))
    drawn: dict[tuple, int] = {}
    for token in torch.cat((shown, asked)).T.tolist():
        drawn[tuple(token)] = drawn.get(tuple(token), 0) + 1
    expected: dict[tuple, float] = {}
    for chance, cues, classes in paths(probe, 3, 3):
        key = (*(3 if c is None else c for c in cues), *classes)
        expected[key] = expected.get(key, 0) + chance
    assert drawn.keys() <= expected.keys()
    for key, chance in expected.items():
        error = (count * chance * (1 - chance)) ** 0.5
        assert abs(drawn.get(key, 0) - count * chance) < 4.5 * error, key


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_best_experts_equal_brute_force(top_k: int) -> None:
    """Every choice of experts, weights by least squares on the definition of the error."""
    generator = torch.Generator().manual_seed(top_k)
    teachers = torch.randn(4, 5, 5, dtype=torch.float64, generator=generator) / 5**0.5
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    posterior = torch.rand(9, 4, dtype=torch.float64, generator=generator).square()
    posterior = posterior / posterior.sum(-1, keepdim=True)
    best = BestExperts(teachers, prior, top_k)
    mean = sum(q * a for q, a in zip(prior, teachers, strict=True))
    for q, got in zip(posterior, best.errors(posterior), strict=True):
        want = min(_least_error(q, teachers, mean, chosen) for chosen in combinations(range(4), top_k))
        assert abs(float(got) - want) < 1e-12
    blind = sum(float(q) * float((a - mean).square().sum()) for q, a in zip(prior, teachers, strict=True)) / 5
    assert best.blind == pytest.approx(blind, abs=1e-12)


def _least_error(
    q: torch.Tensor, teachers: torch.Tensor, mean: torch.Tensor, chosen: tuple[int, ...]
) -> float:
    target = sum(p * a for p, a in zip(q, teachers, strict=True))
    basis = torch.stack([(teachers[n] - mean).flatten() for n in chosen], -1)
    weights = torch.linalg.lstsq(basis, (target - mean).flatten()).solution
    guess = mean + (basis @ weights).view_as(mean)
    return sum(float(p) * float((a - guess).square().sum()) for p, a in zip(q, teachers, strict=True)) / len(
        mean
    )


def predict(best: BestExperts, posterior: torch.Tensor, contents: torch.Tensor) -> torch.Tensor:
    """The best experts' prediction itself, `[T, d_u]`, for posteriors `[T, E]` and contents `[T, d_u]`."""
    b = (posterior @ best.gram)[:, best.choices]  # [T, C, k]
    weights = torch.einsum("tck,ckj->tcj", b, best.inverse)
    chosen = (weights * b).sum(-1).argmax(-1)
    weights = weights[torch.arange(len(chosen)), chosen]
    effective = best.mean + torch.einsum("tk,tkij->tij", weights, best.deviations[best.choices[chosen]])
    return torch.einsum("tij,tj->ti", effective, contents)


@pytest.mark.parametrize("probe", EIGHT)
def test_lines_equal_monte_carlo(probe: str) -> None:
    """What blind and the two oracles really lose on drawn tokens, within 3 standard errors of the computed lines."""
    # Noise 1: at 0.3 an oracle errs on so few tokens that a sample has no standard error to speak of.
    w = World(probe, 2, Knobs(layers=3, experts=5, noise=1.0), torch.float64)
    tokens = w.tokens(6000, "check")
    reference = w.reference(tokens.inputs)
    content = tokens.inputs[..., -CONTENT:]
    predictions = {
        name: [predict(best, q, u) for best, q, u in zip(w.best, posterior, content, strict=True)]
        for name, posterior in zip(
            ("stateless", "oracle"), w.chain.posterior(w.evidence(tokens.inputs)), strict=True
        )
    }
    predictions["blind"] = [u @ best.mean.T for best, u in zip(w.best, content, strict=True)]
    for name, guesses in predictions.items():
        for layer, guess in enumerate(guesses):
            losses = (guess - tokens.targets[layer]).square().mean(-1)
            error = float(losses.std()) / len(losses) ** 0.5 + 1e-9
            line = getattr(reference, name)[layer]
            assert abs(float(losses.mean()) - line) < 3 * error, (name, layer)


def test_lines_are_in_order() -> None:
    for probe in EIGHT:
        reference = World(probe, 0, Knobs()).test_reference
        for blind, stateless, oracle in zip(
            reference.blind, reference.stateless, reference.oracle, strict=True
        ):
            assert oracle <= stateless + 0.01 <= blind + 0.02


def test_worlds_are_keyed_by_seed_and_probe_alone() -> None:
    a, b = World("carry", 3, Knobs()), World("carry", 3, Knobs(steps=7, balance=0.5))
    assert torch.equal(a.tokens(20, "x").inputs, b.tokens(20, "x").inputs)
    assert not torch.equal(a.tokens(20, "x").inputs, a.tokens(20, "y").inputs)
    assert not torch.equal(a.teachers, World("carry", 4, Knobs()).teachers)
    assert not torch.equal(a.teachers, World("lookup", 3, Knobs()).teachers)
