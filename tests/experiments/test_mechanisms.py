"""The mechanism statements: the file parses, names what exists, and verdicts follow from the intervals."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from experiments.mechanisms import (
    MEAN,
    SEEDS,
    Part,
    Results,
    Statement,
    Statements,
    decide,
    decide_all,
    markdown,
    statements,
)
from rmoe.plugins import load_plugins
from rmoe.probes import Knobs, ProbeRow, knobs_with, run
from rmoe.probes.suite import PROBES
from rmoe.routing.zoo import find

PLUGIN = Path(__file__).parents[2] / "experiments" / "probe_routers.py"


def test_statements_name_probes_routers_and_knobs_that_exist() -> None:
    load_plugins((str(PLUGIN),))
    for one in statements().statement:
        assert one.part
        for part in one.part:
            assert part.probe in (*PROBES, MEAN)
            assert part.metric in ProbeRow.__struct_fields__
            for term in (*part.plus, *part.minus):
                name, _, change = term.partition("@")
                find(name)
                if change:
                    knobs_with(dict([change.split("=")]))


def test_the_matched_mlp_has_rmoes_parameters() -> None:
    load_plugins((str(PLUGIN),))
    short = Knobs(steps=1, tokens=2)
    counts = {
        row.router: row.parameters for row in run(["rmoe", "smoe-mlp-matched"], ["carry"], 1, knobs=short)
    }
    assert abs(counts["rmoe"] - counts["smoe-mlp-matched"]) / counts["rmoe"] < 0.001


@pytest.fixture(scope="module")
def row() -> ProbeRow:
    return run(["smoe"], ["carry"], 1, knobs=Knobs(steps=1, tokens=2))[0]


def results(row: ProbeRow, **regrets: list[float]) -> Results:
    """Invented results: router -> regret by seed."""
    return Results(
        [
            msgspec.structs.replace(row, router=name, seed=seed, regret=value, knobs=Knobs())
            for name, values in regrets.items()
            for seed, value in enumerate(values)
        ]
    )


@pytest.mark.parametrize(
    ("a", "b", "expect", "verdict"),
    [
        (0.1, 0.5, "lower", "seen"),
        (0.1, 0.5, "higher", "not seen"),
        (0.5, 0.1, "lower", "not seen"),
        (0.3, 0.3, "lower", "not seen"),  # inside the margin
    ],
)
def test_verdicts(row: ProbeRow, a: float, b: float, expect: str, verdict: str) -> None:
    noise = [0.001 * (-1) ** seed for seed in range(SEEDS)]
    found = results(row, a=[a + e for e in noise], b=[b] * SEEDS)
    part = Part(probe="carry", plus=["a"], minus=["b"], expect=expect)  # type: ignore[arg-type]
    assert decide(part, found).verdict == verdict


def test_what_is_wide_is_not_decided_and_what_is_missing_not_run(row: ProbeRow) -> None:
    wide = [0.3 * (-1) ** seed for seed in range(SEEDS)]
    found = results(row, a=wide, b=[0.0] * SEEDS, few=[0.0] * (SEEDS - 1))
    assert decide(Part(probe="carry", plus=["a"], minus=["b"]), found).verdict == "not decided"
    assert decide(Part(probe="carry", plus=["few"], minus=["b"]), found).verdict == "not run"
    assert decide(Part(probe="carry", plus=["b"], below=0.1), found).verdict == "seen"
    assert decide(Part(probe="carry", plus=["b"], above=0.5), found).verdict == "not seen"
    both = Statements(
        question="",
        statement=[
            Statement(
                "x",
                [Part(probe="carry", plus=["a"], minus=["b"]), Part(probe="carry", plus=["b"], below=0.1)],
            )
        ],
    )
    ((_, verdict, decided),) = decide_all(both, found)
    assert verdict == "not decided"
    assert [d.verdict for d in decided] == ["not decided", "seen"]
    assert markdown([(both.statement[0], verdict, decided)]).count("| not decided |") == 1
