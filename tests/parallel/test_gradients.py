"""Two processes, every layout: the loss and each gradient are those of one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.torchrun import report_of
from tests.versions import since


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report_of("tests.parallel.worker", tmp_path_factory.mktemp("layouts") / "report.json")


HAS_EP = since("transformers", "5.23", "it has no `ep_size`")
EMPTY_SLOTS = ["top-p", "moepp", "remoe", "smoe-capacity"]
BOUND = {
    "fsdp2+ep moepp": 1e-4
}  # its constant experts' gradients cancel: DDP, which moves no token, is off by as much


@pytest.mark.parametrize(
    "case",
    [
        "ddp rmoe",
        "fsdp2 rmoe",
        "fsdp2 smoe tied",
        "fsdp2 smoe erc",
        "fsdp2 smoe competition",
        pytest.param("fsdp2+ep rmoe", marks=HAS_EP),
        pytest.param("fsdp2+ep smoe tied", marks=HAS_EP),
        *(pytest.param(f"fsdp2+ep {router}", marks=HAS_EP) for router in EMPTY_SLOTS),
        pytest.param("tp rmoe", marks=since("torch", "2.13", "its DTensor cannot gather packed experts")),
        "pp rmoe",
        "pp rmoe-lstm",
    ],
)
def test_equal_to_one_process(report, case, note):
    found = report[case]
    note(kind=f"layout: {case}", gradient=max(found["gradients"].values()), loss=found["loss"])
    assert found["loss"] <= 1e-6
    assert found["missing"] == []
    assert len(found["gradients"]) == found["expected"]
    assert max(found["gradients"].values()) <= BOUND.get(case, 1e-6)
    assert any("router_shared" in name for name in found["gradients"]) == (
        "rmoe" in case.split()[1].split("-")
    )


def test_batches_that_a_pipeline_cannot_cut_are_refused(report):
    assert report["refused"] == [
        "micro_batches is 1; allowed: 2 or more, one for each stage",
        "input_ids is 8; allowed: a multiple of micro_batches (3), in sequences",
    ]
