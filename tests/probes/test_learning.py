"""What routers learn: the controls, the order of the paper's Table 5, and that none is below the oracle."""

from __future__ import annotations

import pytest

from rmoe.probes import Knobs, ProbeRow, run

pytestmark = pytest.mark.slow

ROUTERS = ["smoe", "random-smoe", "rmoe", "rmoe-np", "rmoe-np-r1.0", "gated-linear"]


@pytest.fixture(scope="module")
def regret() -> dict[tuple[str, str], list[float]]:
    rows = run(ROUTERS, ["lookup", "carry", "integrate", "overwrite"], 2)
    return by_router_and_probe(rows)


def by_router_and_probe(rows: list[ProbeRow]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row.router, row.probe), []).append(row.regret)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_lookup_is_a_positive_control(regret: dict) -> None:
    for router in ("smoe", "rmoe", "gated-linear"):
        assert mean(regret[router, "lookup"]) < 0.1
    assert mean(regret["random-smoe", "lookup"]) > 0.5


def test_no_mean_regret_is_below_the_oracles(regret: dict) -> None:
    for key, values in regret.items():
        assert mean(values) > -0.02, key


def test_memory_decides_carry(regret: dict) -> None:
    for router in ("smoe", "rmoe-np"):
        assert min(regret[router, "carry"]) > 0.75
    for router in ("rmoe", "gated-linear"):
        assert max(regret[router, "carry"]) < 0.15


def test_integrate_has_the_order_of_table_5(regret: dict) -> None:
    """State passed, then residual scores, then no memory, in every seed."""
    for passed, scores, none in zip(
        regret["rmoe", "integrate"],
        regret["rmoe-np-r1.0", "integrate"],
        regret["rmoe-np", "integrate"],
        strict=True,
    ):
        assert passed < scores < none


def test_a_linear_state_that_can_forget_overwrites(regret: dict) -> None:
    assert mean(regret["gated-linear", "overwrite"]) < 0.5 * mean(regret["smoe", "overwrite"])


def test_more_noise_is_harder_only_up_to_the_oracle() -> None:
    """The knob moves the lines, and regret stays on one scale."""
    rows = run(["rmoe"], ["integrate"], 1, knobs=[Knobs(noise=0.5), Knobs(noise=3.0)])
    easy, hard = rows
    assert sum(easy.reference.oracle) < sum(hard.reference.oracle)
    assert sum(easy.loss) < sum(hard.loss)
