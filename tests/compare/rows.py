"""Result rows for tests, with every field set as a real run sets it."""

from __future__ import annotations

from rmoe.results.comparison import ResultRow, SweepValue, Timing
from rmoe.results.run import Corpus, Curve, Hardware, Parameters, Unit, Versions


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
    return ResultRow(
        router=router,
        router_spec={"name": router},
        seed=seed,
        sweep=sweep or {},
        config={"learning_rate": 1e-3},
        versions=Versions(code="0.1.0", python="3.11", libraries={"torch": "2.13.0"}),
        hardware=Hardware(cpu="test", cores=2, threads=1, memory_gib=4.0),
        corpus=Corpus(name="some text", sha256=corpus_sha256, unit=unit),
        status="finished" if status == "finished" else "failed",
        error=None if status == "finished" else "loss is NaN at step 3",
        steps=20,
        tokens=20 * 2048,
        val=val,
        test=test,
        parameters=Parameters(total=1000, non_embedding=900, router=40, active=500),
        curves={"val": Curve(unit=unit, step=[10, 20], value=[(val or 0) + 0.1, val or 0])},
        timing=timing,
    )
