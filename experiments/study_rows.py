"""One finished run of the study as one committable line: all that its tables need, without the curves' bulk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rmoe.compare.statistics import STRETCHES
from rmoe.errors import RequestError
from rmoe.records import Record, atomic_write
from rmoe.results.run import (
    Averaged,
    CorpusInfo,
    Curve,
    Hardware,
    InitialLogits,
    LayerCurve,
    Parameters,
    RunResult,
    TextLosses,
    Versions,
)

CURVE_POINTS = 10


class StudyRow(Record, frozen=True, kw_only=True):
    """One line of `results/study.jsonl`; the fields are those of `rmoe.results.run.RunResult`."""

    grid: str
    router: str
    seed: int
    config: dict[str, Any]
    versions: Versions
    hardware: Hardware
    corpus: CorpusInfo
    steps: int
    tokens: int
    val: float
    test: float
    parameters: Parameters
    validation: Curve
    initial_logits: InitialLogits | None
    layer_curves: dict[str, LayerCurve]
    entropy_nats: list[float] | None
    inner_balance: list[float] | None
    outer_balance: list[float] | None
    test_losses: TextLosses
    averaged: Averaged
    domains: dict[str, float] = msgspec.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.router}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, str, int]:
        return self.grid, self.router, self.seed


def study_row(grid: str, run: RunResult, domains: dict[str, float] | None = None) -> StudyRow:
    """A finished run's line.

    Args:
        domains: text never trained on -> bits per byte, where that was evaluated.

    Raises:
        RequestError: it is no run of this study: it has no averaged weights or no losses by stretch of text.
    """
    if run.averaged is None or run.test_losses is None or run.val is None or run.test is None:
        raise RequestError(
            "results", f"{run.router}-seed{run.seed} in {grid}", "runs of this study: others measured less"
        )
    assert run.averaged.test_losses is not None
    routing = run.routing
    averaged = msgspec.structs.replace(run.averaged, test_losses=coarser(run.averaged.test_losses))
    return StudyRow(
        grid=grid,
        router=run.router,
        seed=run.seed,
        config=run.config,
        versions=run.versions,
        hardware=run.hardware,
        corpus=run.corpus,
        steps=run.steps,
        tokens=run.tokens,
        val=run.val,
        test=run.test,
        parameters=run.parameters,
        validation=run.curves["val"],
        initial_logits=run.initial_logits,
        layer_curves={name: thinner(curve) for name, curve in run.layer_curves.items()},
        entropy_nats=_short(routing.entropy_nats) if routing else None,
        inner_balance=_short(routing.inner_balance) if routing else None,
        outer_balance=_short(routing.outer_balance) if routing else None,
        test_losses=coarser(run.test_losses),
        averaged=averaged,
        domains=domains or {},
    )


def coarser(losses: TextLosses) -> TextLosses:
    """At most `STRETCHES` stretches, each of several neighbours."""
    size = -(-len(losses.nats) // STRETCHES)
    nats = [round(sum(losses.nats[at : at + size]), 2) for at in range(0, len(losses.nats), size)]
    return TextLosses(blocks=losses.blocks * size, targets=losses.targets, nats=nats)


def thinner(curve: LayerCurve) -> LayerCurve:
    """The first point and about `CURVE_POINTS` more at equal distances, the last among them."""
    last = len(curve.step) - 1
    at = sorted({round(last * index / CURVE_POINTS) for index in range(CURVE_POINTS + 1)})
    value = [[float(f"{x:.4g}") for x in curve.value[index]] for index in at]
    return LayerCurve(unit=curve.unit, step=[curve.step[index] for index in at], value=value)


def _short(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.4g}") for value in values]


def one_code(rows: Iterable[StudyRow | str], equal: Sequence[str] = ()) -> None:
    """Refuse runs that were not all made by one version of the code.

    Args:
        rows: runs, or versions of the code as `rmoe.training.environment.versions` names them.
        equal: versions that count as one.

    Raises:
        RequestError: naming the first two versions, or what has changes that are not committed.
    """
    every = (row if isinstance(row, str) else row.versions.code for row in rows)
    codes = list(dict.fromkeys(equal[0] if code in equal else code for code in every))
    if len(codes) > 1:
        raise RequestError("code", codes[1], f"{codes[0]}, with which the study's runs so far were made")
    if codes and codes[0].endswith(".dirty"):
        raise RequestError("code", codes[0], "a commit without changes: the study runs from a frozen copy")


def read_study_rows(path: Path, equal_codes: Sequence[str] = ()) -> list[StudyRow]:
    """The lines of `results/study.jsonl`.

    Raises:
        RequestError: there is none, a line is no run of this study, or they were not made by one code on one text.
    """
    if not path.exists() or not path.stat().st_size:
        raise RequestError("--results", str(path), "a file that `collect` has written")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(msgspec.json.decode(line, type=StudyRow))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"{path.name} line {number}", str(error), "a run of this study") from None
    one_code(rows, equal_codes)
    texts = list(dict.fromkeys(row.corpus.sha256[:12] for row in rows))
    if len(texts) > 1:
        raise RequestError(f"{path.name}: corpus", texts[1], f"{texts[0]}, the text of its first run")
    return rows


def append_missing(path: Path, rows: Sequence[StudyRow], equal_codes: Sequence[str] = ()) -> int:
    """Add the runs that the file lacks, and what of theirs was evaluated since; returns how many are new.

    Raises:
        RequestError: they and those in the file were not made by one code on one text.
    """
    if not rows:
        return 0
    known = read_study_rows(path, equal_codes) if path.exists() else []
    one_code([*known, *rows], equal_codes)
    merged = {row.key: row for row in known} | {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as staged:
        staged.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in merged.values()))
    return len(merged) - len(known)
