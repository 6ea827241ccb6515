"""The measuring itself: turns, medians, rooflines, and memory that is exactly what tensors take."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch

from benchmarks import measure
from benchmarks.contestant import Contestant, Work
from benchmarks.measure import (
    Roofline,
    Round,
    compare,
    kernel_ms,
    measure_roofline,
    peak_in_own_process,
    peak_mib,
    tensor_peak,
)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order[:8] == ["a", "b", "b", "a"] * 2


def test_ratio_and_spread() -> None:
    found, _ = compare({"a": partial(time.sleep, 0.02), "b": partial(time.sleep, 0.06)}, rounds=4)
    assert found["a"].ratio == 1
    assert found["a"].spread == 0
    assert 2 < found["b"].ratio < 4
    assert found["b"].wall_ms >= 60
    assert found["b"].cpu_ms < found["b"].wall_ms  # it slept


def test_disturbed_rounds_are_measured_again_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other round another process is busy; those rounds are slow, and no figure shows it."""
    others = iter([0.0, 0.0] + [0.0, 0.9] * 20)

    def one_round(calls, order, repeats, device):
        busy = next(others)
        return Round(dict.fromkeys(calls, 1.0 + busy), dict.fromkeys(calls, 1.0), busy)

    monkeypatch.setattr(measure, "one_round", one_round)
    found, busy = compare({"a": lambda: None, "b": lambda: None}, rounds=4)
    assert busy == 0
    assert found["a"].wall_ms == found["b"].wall_ms == 1000


def test_where_it_never_gets_quiet_the_figures_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def one_round(calls, order, repeats, device):
        rounds.append(1)
        return Round(dict.fromkeys(calls, 1.0), dict.fromkeys(calls, 1.0), 0.5)

    monkeypatch.setattr(measure, "one_round", one_round)
    assert compare({"a": lambda: None}, rounds=4)[1] == 0.5
    assert len(rounds) == 2 + 2 * 4


def test_short_calls_are_repeated() -> None:
    calls = []
    found, _ = compare({"a": lambda: calls.append(time.sleep(0.001))}, rounds=3)
    assert len(calls) > 3 * 5
    assert 1 <= found["a"].wall_ms < 10  # of one call


def test_roofline_is_the_slower_of_the_two_in_each_phase() -> None:
    roofline = Roofline(100.0, 10.0)
    assert roofline.seconds(Work(2e11, 1e10)) == 2.0
    assert roofline.seconds(Work(1e11, 3e10)) == 3.0
    assert roofline.seconds(Work(1e11), Work(nbytes=3e10)) == 4.0
    assert roofline.best(Roofline(50.0, 20.0)) == Roofline(100.0, 20.0)


def test_roofline_of_this_machine() -> None:
    found = measure_roofline(repeats=1)
    assert found.gflops > 0.1
    assert found.gbytes > 0.1


def test_products_are_part_of_a_call() -> None:
    a = torch.randn(300, 300)

    def call() -> None:
        (a @ a).exp().sin()

    started = time.perf_counter()
    call()
    whole = time.perf_counter() - started
    found = kernel_ms(call, "cpu", torch.float32, repeats=1)
    assert 0 < found["product_ms"] < 1e5 * whole
    assert found["product_room_gflop"] > 0
    assert set(kernel_ms(lambda: a.exp(), "cpu", torch.float32, repeats=1).values()) == {0}


def test_attentions_kernels_are_told_apart() -> None:
    q = torch.randn(1, 2, 64, 16, requires_grad=True)

    def call() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    assert kernel_ms(call, "cpu", torch.float32, repeats=1)["attention_ms"] > 0


def test_peak_counts_what_lives_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.ones(1 << 20)

    def together() -> None:
        _ = [torch.ones(1 << 20) for _ in range(5)]

    assert tensor_peak(lambda: one_after_the_other) == 4 << 20
    assert tensor_peak(lambda: together) == 20 << 20


def test_peak_leaves_out_what_building_needed_for_a_moment() -> None:
    def build():
        torch.ones(1 << 22)
        kept = torch.ones(1 << 20)
        return lambda: kept.add_(1)[:1].clone()

    assert 4 << 20 <= tensor_peak(build) < 5 << 20


def test_peak_of_a_contestant_holds_what_it_was_built_from() -> None:
    def build():
        weights = torch.ones(1 << 20)
        return lambda: weights * 2

    assert peak_mib(Contestant(build), "cpu") == pytest.approx(8, abs=0.01)


def test_peak_in_a_process_of_its_own_is_the_same_each_time() -> None:
    """Tensors' bytes do not depend on what ran before; the resident size would."""
    first, again = (peak_in_own_process("block", "toy", "cpu", "per-expert loop", 1) for _ in range(2))
    assert first == again > 0


def _grow() -> float:
    held = []

    def build():
        held.append(bytearray(64 << 20))
        return lambda: None

    return peak_mib(Contestant(build, memory="resident"), "cpu")


def test_resident_growth() -> None:
    """In a forked process, whose peak begins with what it has; this one's may have been far above that."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(_grow).result() == pytest.approx(64, abs=8)
