"""Probe results over seeds: means, t intervals, paired differences to a baseline. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmoe.compare.statistics import decide, paired, t_interval
from rmoe.errors import RequestError
from rmoe.results.probes import MEAN, Against, Card, Detail, Point, ProbeRow, Reference, Score, Summary

BY_LAYER = (
    "loss",
    "regret_by_layer",
    "accuracy",
    "mutual_information",
    "entropy",
    "inner_balance",
    "outer_balance",
    "load",
    "decodability",
)


def summarise(
    rows: Sequence[ProbeRow], baseline: str | None = None, margin: float = 0.02, swept: str | None = None
) -> Summary:
    """The summary of a run's rows; routers stand in the order of their mean regret.

    Args:
        baseline: None is `smoe`, or else the first router.
        margin: half-width of "equivalent", in regret.
        swept: the knob in which settings differ.
    """
    if not rows:
        raise RequestError("results", "no rows", "at least one")
    knobs = rows[0].knobs
    first = [row for row in rows if row.knobs == knobs]
    names = list(dict.fromkeys(row.router for row in first))
    probes = list(dict.fromkeys(row.probe for row in first))
    baseline = baseline or ("smoe" if "smoe" in names else names[0])
    table = {
        (name, probe): [row for row in first if row.router == name and row.probe == probe]
        for name in names
        for probe in probes
    }
    by_seed = {
        probe: {name: {row.seed: row.regret for row in table[name, probe]} for name in names}
        for probe in probes
    }
    by_seed[MEAN] = {name: _mean_over_probes([by_seed[p][name] for p in probes]) for name in names}
    scores = {probe: _scores(found, baseline, margin) for probe, found in by_seed.items()}
    cards = [
        _card(name, {p: table[name, p] for p in probes}, {p: scores[p][name] for p in by_seed})
        for name in names
    ]
    return Summary(
        baseline=baseline,
        margin=margin,
        knobs=knobs,
        probes=probes,
        references={
            probe: _reference([row for name in names for row in table[name, probe]]) for probe in probes
        },
        cards=sorted(cards, key=lambda card: card.scores[MEAN].mean),
        swept=swept,
        points=_points(rows, swept) if swept else [],
        code=", ".join(dict.fromkeys(row.code for row in rows)),
        torch=", ".join(dict.fromkeys(row.torch for row in rows)),
    )


def _mean_over_probes(by_probe: Sequence[dict[int, float]]) -> dict[int, float]:
    shared = sorted(set.intersection(*(set(found) for found in by_probe)))
    return {seed: float(np.mean([found[seed] for found in by_probe])) for seed in shared}


def _scores(by_router: dict[str, dict[int, float]], baseline: str, margin: float) -> dict[str, Score]:
    """Every router's score on one probe, and its paired difference to the baseline."""
    differences = paired(by_router, baseline)
    against = {
        name: Against(
            mean=float(np.mean(list(differences[name].values()))),
            interval=test.interval,
            p=test.p_differs,
            p_holm=test.p_holm,
            p_equivalent=test.p_equal_holm,
            verdict=test.verdict,
        )
        for name, test in decide(differences, margin).items()
    }
    return {
        name: Score(
            seeds=sorted(found),
            regrets=[found[seed] for seed in sorted(found)],
            mean=float(np.mean(list(found.values()))),
            interval=t_interval(list(found.values()))[0] if len(found) > 1 else None,
            against=against.get(name),
        )
        for name, found in by_router.items()
    }


def _card(name: str, by_probe: dict[str, list[ProbeRow]], scores: dict[str, Score]) -> Card:
    rows = [row for found in by_probe.values() for row in found]
    return Card(
        router=name,
        parameters=rows[0].parameters,
        seconds=float(np.mean([row.seconds for row in rows])),
        note=next((row.note for row in rows if row.note), ""),
        scores=scores,
        details={probe: _detail(found) for probe, found in by_probe.items()},
    )


def _detail(rows: Sequence[ProbeRow]) -> Detail:
    shares = [row.recurrent_share for row in rows if row.recurrent_share is not None]
    layered = {name: [getattr(row, name) for row in rows] for name in BY_LAYER}
    return Detail(
        by_layer={
            name: np.mean(values, axis=0).tolist()
            for name, values in layered.items()
            if all(value is not None for value in values)
        },
        curve_step=rows[0].curve_step,
        curve_regret=np.mean([row.curve_regret for row in rows], axis=0).tolist(),
        steps_to_half=_median([row.steps_to_half for row in rows]),
        steps_to_tenth=_median([row.steps_to_tenth for row in rows]),
        recurrent_share=float(np.mean(shares)) if shares else None,
    )


def _median(steps: Sequence[int | None]) -> float | None:
    """None if half of them never came there."""
    median = float(np.median([np.inf if step is None else step for step in steps]))
    return median if np.isfinite(median) else None


def _reference(rows: Sequence[ProbeRow]) -> Reference:
    """Mean over seeds: each seed is its own world, the same for all routers."""
    worlds = list({row.seed: row.reference for row in rows}.values())
    return Reference(
        **{
            name: np.mean([getattr(world, name) for world in worlds], axis=0).tolist()
            for name in ("blind", "stateless", "oracle")
        }
    )


def _points(rows: Sequence[ProbeRow], swept: str) -> list[Point]:
    found: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        value = getattr(row.knobs, swept)
        found.setdefault((row.router, row.probe, float(value)), []).append(row.regret)
    return [
        Point(router=name, probe=probe, value=value, regret=float(np.mean(regrets)))
        for (name, probe, value), regrets in found.items()
    ]
