"""Plans of FSDP2 and DDP against real steps of two processes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planning.worker import CASES, COPIED
from tests.torchrun import report_of
from tests.versions import since


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report_of("tests.planning.worker", tmp_path_factory.mktemp("sharded") / "report.json")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=since("transformers", "5.23", "it has no `ep_size`"))
        if "EP" in case
        else case
        for case in (*CASES, *COPIED)
    ],
)
def test_memory_is_within_a_tenth_of_a_real_step(case: str, report: dict[str, Any], note: Any) -> None:
    planned, real = report[case]["planned"], report[case]["real"]
    note(kind=f"plan: {case}", ratio=planned / real)
    assert planned == pytest.approx(real, rel=0.1)


def test_gradients_are_cut_up_after_each_micro_batch(report: dict[str, Any]) -> None:
    """Put off to the step's end, the reduce-scatter would leave the whole model's gradients on every device."""
    assert report["cut"] == [True, True]
