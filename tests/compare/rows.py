"""Result rows for tests, with every field set as a real run sets it."""

from __future__ import annotations

from typing import Any

import msgspec

from rmoe.results.rows import Failure, ResultRow, SweepValue, Timing
from rmoe.results.run import CorpusInfo, Curve, Hardware, Parameters, RunResult, Unit, Versions


def row(
    router: str,
    seed: int,
    val: float | None,
    *,
    test: float | None = 2.0,
    sweep: dict[str, SweepValue] | None = None,
    unit: Unit = "bits_per_byte",
    corpus_sha256: str = "a" * 64,
    status: str = "finished",
    timing: Timing | None = None,
) -> ResultRow:
    known = {
        "router_spec": {"name": router},
        "config": {"learning_rate": 1e-3},
        "versions": Versions(code="0.1.0", python="3.11", libraries={"torch": "2.13.0"}),
        "hardware": Hardware(cpu="test", cores=2, threads=1, memory_gib=4.0),
        "corpus": CorpusInfo(name="some text", sha256=corpus_sha256, unit=unit),
    }
    result = RunResult(
        **known,
        router=router,
        seed=seed,
        steps=20,
        tokens=20 * 2048,
        skipped_batches=0,
        val=val,
        test=test,
        context="up to 128 tokens",
        parameters=Parameters(total=1000, non_embedding=900, router=40, active=500),
        curves={"val": Curve(unit=unit, step=[10, 20], value=[(val or 0) + 0.1, val or 0])},
        seconds_per_1k_steps=30.0,
        peak_mib=400.0,
        folder="runs/one",
        model="runs/one/model",
    )
    finished = status == "finished"
    return ResultRow(
        router=router,
        seed=seed,
        sweep=sweep or {},
        result=result if finished else None,
        failure=None if finished else Failure(error="loss is NaN at step 3", **known),
        timing=timing,
    )


def changed(row: ResultRow, **changes: Any) -> ResultRow:
    """A finished row with changes to its result."""
    assert row.result is not None
    return msgspec.structs.replace(row, result=msgspec.structs.replace(row.result, **changes))
