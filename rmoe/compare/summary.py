"""From result rows to `summary.json`: choose sweep points, take spreads, test differences, state the finding.

Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from rmoe.compare import statistics
from rmoe.compare.equal_time import below_floor, equal_time, fit_law
from rmoe.compare.sequential import Looks
from rmoe.errors import RequestError
from rmoe.report.charts.chart import counted
from rmoe.report.table import signed
from rmoe.results.comparison import (
    SPLITS,
    UNITS,
    Band,
    Difference,
    Interval,
    LossLaw,
    RouterSummary,
    Split,
    Summary,
    SweepPoint,
    unit_of_differences,
)
from rmoe.results.rows import ResultRow, SweepValue, check_comparable
from rmoe.results.run import Curve, LayerCurve, RunResult, Unit

SCALE_RATIO = 1.5  # arms whose logits start further apart than this are not compared at one scale


def sweep_points(rows: Sequence[ResultRow]) -> list[SweepPoint]:
    """Mean validation loss of every sweep point, and which one each router is compared at.

    The point with the lowest mean is chosen among those that finished the most seeds: a learning rate that
    loses a run is not chosen for the runs it did not lose.
    """
    grouped: dict[str, dict[str, list[tuple[dict[str, SweepValue], float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row.result is not None and row.result.val is not None:
            grouped[row.router][repr(sorted(row.sweep.items()))].append((row.sweep, row.result.val))
    found = []
    for router, points in grouped.items():
        means = {name: float(np.mean([val for _, val in group])) for name, group in points.items()}
        most = max(len(group) for group in points.values())
        best = min((name for name, group in points.items() if len(group) == most), key=means.__getitem__)
        found += [
            SweepPoint(router=router, sweep=group[0][0], n=len(group), val=means[name], chosen=name == best)
            for name, group in points.items()
        ]
    return found


def chosen_sweep(points: Sequence[SweepPoint]) -> dict[str, dict[str, SweepValue]]:
    """Router -> the sweep point it is compared at."""
    return {point.router: point.sweep for point in points if point.chosen}


def band(curves: Sequence[Curve]) -> Band | None:
    """Mean and range over seeds, at the steps that all curves have; None when they share no step."""
    shared, values = _at_shared_steps(curves)
    if not shared:
        return None
    return Band(
        unit=curves[0].unit,
        n=len(curves),
        step=shared,
        mean=values.mean(axis=0).tolist(),
        low=values.min(axis=0).tolist(),
        high=values.max(axis=0).tolist(),
    )


def _at_shared_steps(curves: Sequence[Curve] | Sequence[LayerCurve]) -> tuple[list[int], np.ndarray]:
    """The steps that all curves have, and every curve's values there: `[curves, steps]`, or with layers last."""
    by_step = [dict(zip(curve.step, curve.value, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*map(set, by_step)))
    return shared, np.array([[one[step] for step in shared] for one in by_step])


def summarise(
    rows: Sequence[ResultRow],
    preset: str,
    baseline: str,
    descriptions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    margin: float = statistics.MARGIN_BITS,
    looks: Looks | None = None,
    branches: Sequence[ResultRow] = (),
    planned: int = 0,
) -> Summary:
    """Summarise a comparison.

    Args:
        rows: one per run, of one corpus.
        baseline: the router the others are compared with.
        descriptions: router -> what it is, in a phrase.
        notes: said beside the verdict: problems met, what to expect.
        margin: half-width of "equivalent", in bits.
        looks: of a sequential comparison; None is one look.
        branches: the baseline's shorter runs, for a comparison at equal time.
        planned: routers that are compared with the baseline, those without a pair so far included.

    Raises:
        RequestError: no row finished, two corpora, or no run of the baseline.
    """
    check_comparable(list(rows), "results")
    rows, timed_apart = one_timing_phase(rows, baseline)
    points = sweep_points(rows)
    chosen = chosen_sweep(points)
    if not chosen:
        raise RequestError("results", f"{len(rows)} runs, none finished", "at least one finished run")
    if baseline not in {row.router for row in rows}:
        raise RequestError("--baseline", baseline, ", ".join(sorted(chosen)))
    runs = [row.result for row in rows if row.result is not None and row.sweep == chosen.get(row.router)]
    split, said = _split(runs, baseline)
    values = _values(runs, split)
    unit = unit_of_differences(rows[0].run.corpus.unit)
    compared = partial(
        statistics.compare_to_baseline,
        baseline=baseline,
        unit=unit,
        split=split,
        margin=margin,
        looks=looks,
        planned=planned,
    )
    differences = compared(values)
    between_averages = compared(_values(runs, split, averaged=True))
    routers = [
        _router(
            name,
            [row for row in rows if row.router == name],
            chosen.get(name),
            against={run.seed: run for run in runs if run.router == baseline != name},
            difference=differences.get(name),
            averaged=between_averages.get(name),
            description=(descriptions or {}).get(name, ""),
        )
        for name in dict.fromkeys(row.router for row in rows)
    ]
    law, of_law = _law(branches, runs, baseline, split)
    if law is not None:
        seconds = {r.router: r.timing.seconds_per_1k_steps for r in routers if r.timing is not None}
        if baseline not in seconds:
            of_law = ["No comparison at equal time: the routers were not timed alone (--timing-rounds)."]
        at_equal = equal_time(values, seconds, baseline, law, unit, split, margin, looks, planned)
        if low := [name for name in below_floor(values, law) if name in seconds]:
            one = "it" if low != [baseline] else "any router"
            of_law.append(
                f"{', '.join(low)}: a loss is not above the law's floor, so {one} is not compared at equal time."
            )
        routers = [
            msgspec.structs.replace(router, equal_time=at_equal.get(router.router)) for router in routers
        ]
    return Summary(
        preset=preset,
        baseline=baseline,
        corpus=rows[0].run.corpus,
        confidence=statistics.CONFIDENCE,
        verdict=verdict_sentence(differences, baseline, margin),
        notes=[
            *_scale_notes(routers),
            *_look_notes(differences, looks),
            *said,
            *timed_apart,
            *_notes(rows, differences),
            *of_law,
            *notes,
        ],
        routers=sorted(routers, key=lambda r: _rank(r, split)),
        sweep_points=points if any(point.sweep for point in points) else [],
        law=law,
        failed_branches=sum(row.failure is not None for row in branches),
        hardware=rows[0].run.hardware,
        versions=rows[0].run.versions,
    )


def _split(runs: Sequence[RunResult], baseline: str) -> tuple[Split, list[str]]:
    """The split on which routers are compared: test, where every run of the baseline has it; and what is left out."""
    tested = [run for run in runs if run.test is not None]
    without = _counted_by_router(run for run in runs if run.test is None)
    if not tested or not without:
        return "test" if tested else "val", []
    if any(run.router == baseline and run.test is None for run in runs):
        return "val", [f"Compared on the validation split, as there is no test value of {without}."]
    return "test", [f"Left out of the differences, as there is no test value: {without}."]


def _law(
    branches: Sequence[ResultRow], runs: Sequence[RunResult], baseline: str, split: Split
) -> tuple[LossLaw | None, list[str]]:
    """The law of the baseline's loss, over the seeds that have every length, and what is missing."""
    if not branches:
        return None, []
    failures = [
        f"{row.key}, a shorter run of {baseline}, failed: {row.failure.error}"
        for row in branches
        if row.failure
    ]
    by_seed: dict[int, dict[int, float]] = defaultdict(dict)
    for run in (*(row.result for row in branches if row.result), *runs):
        value: float | None = getattr(run, split)
        if run.router == baseline and value is not None:
            by_seed[run.seed][run.steps] = statistics.bits(value, run.corpus.unit)
    whole = [lengths for lengths in by_seed.values() if len(lengths) == 3]
    if not whole:
        none = f"No comparison at equal time: no seed of {baseline} has finished all three lengths."
        return None, [none, *failures]
    steps = sorted(whole[0])
    losses = [float(np.mean([lengths[n] for lengths in whole])) for n in steps]
    law = fit_law(steps, losses)
    shown = ", ".join(f"{loss:.4f} after {n:,} steps" for n, loss in zip(steps, losses, strict=True))
    if law is None:
        none = f"No comparison at equal time: no law goes through {baseline}'s losses, {shown}."
        return None, [none, *failures]
    return law, [
        f"At equal time: {baseline}'s losses, {shown} ({counted([len(whole)], 'seed')}), follow a power law with "
        f"exponent {law.exponent:.3f} and floor {law.floor:.4f}; every router is taken to share both. "
        "Times are of steps run alone.",
        *failures,
    ]


def _counted_by_router(runs: Iterable[RunResult]) -> str:
    """`2 runs of rmoe, 1 run of smoe`; nothing of none."""
    numbers = Counter(run.router for run in runs)
    return ", ".join(f"{counted([n], 'run')} of {name}" for name, n in numbers.items())


def _rank(router: RouterSummary, split: Split) -> float:
    spread = router.test if split == "test" else router.val
    return spread.mean if spread else float("inf")


def _router(
    name: str,
    rows: Sequence[ResultRow],
    sweep: dict[str, SweepValue] | None,
    against: Mapping[int, RunResult],
    difference: Difference | None,
    averaged: Difference | None,
    description: str,
) -> RouterSummary:
    """One row of the table, from a router's rows and its chosen sweep point (None: no run has a value)."""
    rows = sorted(rows, key=lambda row: row.seed)
    mine = [row.result for row in rows if row.result is not None and row.sweep == sweep]
    if difference is not None and difference.split == "test":
        over_text = _text_interval(mine, against)
        difference = msgspec.structs.replace(difference, text_interval=over_text)
    shared = set.intersection(*(set(run.curves) for run in mine)) if mine else set()
    curves = {name: band([run.curves[name] for run in mine]) for name in sorted(shared)}
    return RouterSummary(
        router=name,
        summary=description,
        sweep=sweep or {},
        finished=len(mine),
        failed=sum(row.failure is not None for row in rows),
        val=statistics.spread({run.seed: run.val for run in mine if run.val is not None}),
        test=statistics.spread({run.seed: run.test for run in mine if run.test is not None}),
        difference=difference,
        parameters=mine[0].parameters if mine else None,
        timing=next((row.timing for row in rows if row.timing and row.sweep == sweep), None),
        curves={name: joined for name, joined in curves.items() if joined},
        val_difference=_val_difference(mine, against),
        initial_logit_std=_initial_logit_std(mine),
        layer_curves=_layer_curves(mine),
        averaged=averaged,
    )


def _text_interval(mine: Sequence[RunResult], against: Mapping[int, RunResult]) -> Interval | None:
    """Of the difference in bits per byte; perplexities per word have no losses per token."""
    pairs = [(run.test_losses, against[run.seed].test_losses) for run in mine if run.seed in against]
    known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(known) < len(pairs) or any(run.corpus.unit != "bits_per_byte" for run in mine):
        return None
    interval = statistics.text_interval([ours for ours, _ in known], [theirs for _, theirs in known])
    if interval is None:
        return None
    run = mine[0]
    assert run.test is not None and run.test_losses is not None  # noqa: PT018 - both or neither
    # From bits per token to bits per byte: one constant of the text, whatever the run.
    per_byte = run.test / (sum(run.test_losses.nats) / run.test_losses.targets / math.log(2))
    return Interval(low=interval.low * per_byte, high=interval.high * per_byte)


def _values(runs: Sequence[RunResult], split: Split, averaged: bool = False) -> dict[str, dict[int, float]]:
    """Router -> seed -> value in bits; with `averaged` that of the averaged weights, where there are any."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        value = getattr(run.averaged if averaged else run, split, None)
        if value is not None:
            found[run.router][run.seed] = statistics.bits(value, run.corpus.unit)
    return found


def _initial_logit_std(runs: Sequence[RunResult]) -> float | None:
    """Mean over layers and seeds; None where it was not measured or there is no scorer."""
    starts = [np.mean(run.initial_logits.start) for run in runs if run.initial_logits is not None]
    return float(np.mean(starts)) if starts else None


def _layer_curves(runs: Sequence[RunResult]) -> dict[str, LayerCurve]:
    """Means over seeds, at the steps that all of them logged."""
    found = {}
    for name in sorted(set.intersection(*(set(run.layer_curves) for run in runs)) if runs else ()):
        curves = [run.layer_curves[name] for run in runs]
        shared, values = _at_shared_steps(curves)
        if shared:
            found[name] = LayerCurve(unit=curves[0].unit, step=shared, value=values.mean(axis=0).tolist())
    return found


def _val_difference(mine: Sequence[RunResult], against: Mapping[int, RunResult]) -> Band | None:
    """The validation curve minus the baseline's, seed by seed, in bits."""
    pairs = [
        (run.curves["val"], against[run.seed].curves["val"], run.corpus.unit)
        for run in mine
        if run.seed in against and "val" in run.curves and "val" in against[run.seed].curves
    ]
    return band([_minus(ours, theirs, unit) for ours, theirs, unit in pairs]) if pairs else None


def _minus(ours: Curve, theirs: Curve, unit: Unit) -> Curve:
    at = dict(zip(theirs.step, theirs.value, strict=True))
    points = [
        (step, statistics.bits(value, unit) - statistics.bits(at[step], unit))
        for step, value in zip(ours.step, ours.value, strict=True)
        if step in at
    ]
    return Curve(
        unit=UNITS[unit_of_differences(unit)], step=[s for s, _ in points], value=[v for _, v in points]
    )


def verdict_sentence(differences: Mapping[str, Difference], baseline: str, margin: float) -> str:
    """The finding in one sentence, with its interval.

    With several routers, the one that leads is named, and how many have which verdict.
    """
    if not differences:
        return f"Nothing to compare: no router shares a finished seed with the baseline {baseline}."
    tested = {name: d for name, d in differences.items() if d.interval is not None}
    name, best = min((tested or differences).items(), key=lambda item: item[1].mean)
    where = f"{UNITS[best.unit]} on the {SPLITS[best.split]} split"
    if best.interval is None:
        return (
            f"One seed gives no verdict: {name} minus {baseline} is {signed(best.mean)} {where}, "
            "and nothing says how much of that is chance."
        )
    interval = (
        f"{statistics.CONFIDENCE:.0%} interval {signed(best.interval.low)} to {signed(best.interval.high)}"
    )
    figure = f"{signed(best.mean)} {where} ({interval}, {len(best.values)} paired seeds)"
    if len(differences) == 1:
        return f"{name} minus {baseline} is {figure}: {_spoken(best.verdict, margin)}."
    lowest = "the lowest" if len(tested) == len(differences) else "the lowest with more than one pair"
    counts = ", ".join(
        f"{sum(d.verdict == verdict for d in differences.values())} {_spoken(verdict, margin)}"
        for verdict in dict.fromkeys(d.verdict for d in differences.values())
    )
    return (
        f"Of {len(differences)} routers against {baseline}: {counts}; "
        f"{lowest} is {name} with {figure}, {_spoken(best.verdict, margin)}."
    )


def _spoken(verdict: str, margin: float) -> str:
    if verdict == "equivalent":
        return f"equivalent within {margin:g} bits"
    return "one seed, no verdict" if verdict.startswith("one seed") else verdict


def _scale_notes(routers: Sequence[RouterSummary]) -> list[str]:
    """A warning when arms start, or later train, at scales that differ by more than `SCALE_RATIO`."""
    scales = {r.router: r.initial_logit_std for r in routers if r.initial_logit_std}
    if not scales:
        return []
    low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
    if scales[high] > SCALE_RATIO * scales[low]:
        return [
            f"Warning: the routers start at different scales. The raw logits of {low} have a standard deviation of "
            f"{scales[low]:.2g} before step 0, those of {high} {scales[high]:.2g}. That alone can move the loss by "
            "more than a router does; --match-logits 1.0 starts all of them at one scale."
        ]
    return _parted_notes({r.router: r.curves["logit_std"] for r in routers if "logit_std" in r.curves})


def _parted_notes(curves: Mapping[str, Band]) -> list[str]:
    """A warning when logits that start at one scale do not stay there: at the step where they are furthest apart."""
    means = {name: dict(zip(curve.step, curve.mean, strict=True)) for name, curve in curves.items()}
    widest = (0.0, 0, "", "")
    for step in sorted(set.intersection(*map(set, means.values()))) if means else []:
        low, high = min(means, key=lambda r: means[r][step]), max(means, key=lambda r: means[r][step])
        if means[low][step] > 0:
            widest = max(widest, (means[high][step] / means[low][step], step, low, high))
    ratio, step, low, high = widest
    if ratio <= SCALE_RATIO:
        return []
    return [
        "Warning: the routers start at one scale and leave it. "
        f"After step {step:,} the raw logits of {low} have a standard deviation of {means[low][step]:.2g}, those of "
        f"{high} {means[high][step]:.2g}. A state that is small at the start and grows does that to its scorer; "
        "a row that normalises its state (rmoe-norm) keeps its scale."
    ]


def _look_notes(differences: Mapping[str, Difference], looks: Looks | None) -> list[str]:
    """How a sequential comparison came to its verdicts, and what it saved."""
    if looks is None:
        return []
    # A router without a verdict that has fewer pairs has lost them: its runs failed.
    saved = sum(looks[-1] - len(d.values) for d in differences.values() if statistics.stands(d))
    return [
        f"Pairs were added until a verdict stood, looking at {looks[0]} to {looks[-1]}: verdicts and intervals keep "
        f"their level over all looks (O'Brien-Fleming spending). Pairs not needed: {saved} of "
        f"{looks[-1] * len(differences)}."
    ]


def first_rows(rows: Sequence[ResultRow], among: Container[str] | None = None) -> dict[str, ResultRow]:
    """Router -> its first finished run at its chosen sweep point, of all or of those with these keys.

    Of all, it is the one that has the router's times.
    """
    chosen = chosen_sweep(sweep_points(rows))
    found: dict[str, ResultRow] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        counts = among is None or row.key in among
        if counts and row.result is not None and row.sweep == chosen.get(row.router):
            found.setdefault(row.router, row)
    return found


def one_timing_phase(rows: Sequence[ResultRow], baseline: str) -> tuple[list[ResultRow], list[str]]:
    """The rows with the times of one phase on one machine, the baseline's: others share no column with them.

    Only a router's first row counts. Another has times where it was the first, before a run was added.

    Returns:
        The rows, and a note for what lost its times.
    """

    def machine(row: ResultRow) -> tuple[str | None, str]:
        assert row.timing is not None
        hardware = row.timing.hardware or row.run.hardware
        return row.timing.machine, hardware.accelerator or f"{hardware.cpu}, {hardware.cores} cores"

    def alike(one: ResultRow, two: ResultRow) -> bool:
        (name, kind), (other_name, other_kind) = machine(one), machine(two)
        return kind == other_kind and (name == other_name or None in (name, other_name))

    timed = {name: row for name, row in first_rows(rows).items() if row.timing is not None}
    kept = timed.get(baseline) or next(iter(timed.values()), None)
    elsewhere = {name for name, row in timed.items() if kept and not alike(row, kept)}
    shown = {name for name, row in timed.items() if kept and together([row, kept])} - elsewhere
    apart = {row.router for row in rows if row.timing is not None} - shown - elsewhere
    notes = [
        f"No time and memory for {', '.join(sorted(names))}: {why}"
        for names, why in (
            (elsewhere, f"timed on another machine than {baseline}. Call `rmoe compare` again with --engine.node "
             "to time all on one."),
            (apart, f"not timed together with {baseline}. Call `rmoe compare` again without --timing-rounds 0."),
        )
        if names
    ]  # fmt: skip
    keys = {timed[name].key for name in shown}
    return [row if row.key in keys else msgspec.structs.replace(row, timing=None) for row in rows], notes


def together(rows: Iterable[ResultRow]) -> bool:
    """Whether rows were all timed, in one phase."""
    return len({row.timing and row.timing.begun for row in rows}) < 2 and all(row.timing for row in rows)


def _notes(rows: Sequence[ResultRow], differences: Mapping[str, Difference]) -> list[str]:
    notes = []
    if any(difference.interval is None for difference in differences.values()):
        notes.append("A router with one seed is listed, not ranked: one seed ranks nothing.")
    if sum(difference.p is not None for difference in differences.values()) > 1:
        notes.append(
            f"Verdicts use p values corrected over all routers (Holm); intervals are {statistics.CONFIDENCE:.0%} each, "
            "not corrected."
        )
    codes = dict.fromkeys(row.result.versions.code for row in rows if row.result)
    if len(codes) > 1:
        notes.append(f"The runs were made by {len(codes)} versions of the code: {', '.join(codes)}.")
    for row in rows:
        if row.failure:
            notes.append(f"{row.key} failed and is left out: {row.failure.error}")
    return notes
