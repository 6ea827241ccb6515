"""Routers x probes x seeds: what is missing of it is trained, and appended to `results.jsonl`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import rmoe
from rmoe.errors import RequestError, RunError
from rmoe.plugins import load_plugins
from rmoe.probes.measure import measures
from rmoe.probes.stack import Ensemble, RouterStack, fitted
from rmoe.probes.suite import named_probes
from rmoe.probes.train import Curve, regret, regret_by_layer, train
from rmoe.probes.world import World, world
from rmoe.records import Record, append_records
from rmoe.results.probes import Knobs, ProbeRow, checked, read_rows
from rmoe.routing.spec import RouterSpec
from rmoe.routing.zoo import OWN, ZooRow, find, select

RESULTS = "results.jsonl"
AT_ONCE = 2  # routers trained on the same batches; resuming repeats at most so many


class Asked(Record, frozen=True, kw_only=True):
    """A router as a worker process gets it."""

    name: str
    spec: dict[str, Any]
    top_k: int


class ProbeUnit(Record, frozen=True, kw_only=True):
    """What is trained in one pass: some routers on the same (probe, seed) lanes.

    Attributes:
        plugins: modules or files that register the routers' parts, for a process that has not loaded them.
    """

    routers: list[Asked]
    lanes: list[tuple[str, int]]
    knobs: Knobs
    plugins: tuple[str, ...] = ()

    def carry_out(self) -> list[ProbeRow]:
        """Train and measure it, in any process; runs that diverged are left out."""
        plugins = load_plugins(self.plugins)
        started = time.perf_counter()
        with _one_thread():
            worlds = [world(probe, seed, self.knobs) for probe, seed in self.lanes]
            ensembles = [
                Ensemble(RouterSpec.from_dict(r.spec), r.top_k, self.lanes, self.knobs) for r in self.routers
            ]
            curves = train(ensembles, worlds, self.knobs)
            found = [
                fields
                for asked, ensemble, curve in zip(self.routers, ensembles, curves, strict=True)
                for fields in _measured(asked, ensemble, curve, worlds)
            ]
        each = (time.perf_counter() - started) / (len(self.routers) * len(self.lanes))
        # A run that diverged has no numbers to write; the others of its pass are not touched by it. A gate that
        # compares with NaN may ask no expert, and then the loss is finite.
        return [
            _row(fields, each, plugins)
            for fields in found
            if all(map(math.isfinite, (fields["regret"], *fields["entropy"])))
        ]


def one_by_one(units: Sequence[ProbeUnit]) -> Iterator[list[ProbeRow]]:
    """Every unit's rows, trained in this process."""
    return (unit.carry_out() for unit in units)


def run(
    routers: Sequence[str] | Mapping[str, RouterSpec | ZooRow],
    probes: Sequence[str] = ("all",),
    seeds: int | Sequence[int] = 8,
    out: Path | str | None = None,
    *,
    knobs: Knobs | Sequence[Knobs] = Knobs(),  # noqa: B008  frozen
    plugins: Sequence[str] = (),
    carried_out: Callable[[Sequence[ProbeUnit]], Iterator[list[ProbeRow]]] = one_by_one,
    progress: Callable[[str], None] = lambda line: None,
) -> list[ProbeRow]:
    """Run probes; with `out`, resume what is there.

    Args:
        routers: names from the zoo, `all`, `paper`; or name -> router, which is taken as it is, its width included.
        probes: names, or `all`.
        seeds: how many, from 0, or which.
        out: folder of `results.jsonl`; None keeps results in memory only.
        knobs: one setting, or several for a sweep.
        plugins: modules or files that register routers, for worker processes too.
        carried_out: gives the units' rows in any order; results do not depend on where they come from.
        progress: is given a line per finished unit, and one for each line of `results.jsonl` that cannot be read.

    Returns:
        A row per (router, probe, seed, knobs) asked for, in that order.

    Raises:
        RequestError: an unknown router or probe, sizes that cannot work, or results of another version or router.
        RunError: a run diverged; all others are done.
    """
    hashes = load_plugins(tuple(plugins))
    settings = [checked(one) for one in ([knobs] if isinstance(knobs, Knobs) else knobs)]
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    if not len(chosen):
        raise RequestError("--seeds", seeds, "1 or more")
    asked = _asked(routers, settings)
    lanes = [(probe, seed) for probe in named_probes(tuple(probes)) for seed in chosen]
    done = _finished(Path(out) / RESULTS if out is not None else None, asked, hashes, progress)
    units = list(_units(asked, lanes, done, tuple(plugins)))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(carried_out(units), start=1):
        if out is not None:
            append_records(Path(out) / RESULTS, *rows)
        done.update({row.key: row for row in rows})
        names = ", ".join(dict.fromkeys(row.router for row in rows))
        progress(
            f"{number} of {len(units)}: {names}: {len(rows)} runs in {sum(row.seconds for row in rows):.0f} s"
        )
    wanted = [(name, probe, seed, k) for name, k in asked for probe, seed in lanes]
    lost = [f"{key[0]} on {key[1]}, seed {key[2]}" for key in wanted if key not in done]
    if lost:
        saved = "nothing, without a folder" if out is None else "every other run"
        raise RunError(f"training diverged: {'; '.join(lost)}", saved, "a smaller learning_rate")
    return [done[key] for key in wanted]


def _asked(
    routers: Sequence[str] | Mapping[str, RouterSpec | ZooRow], settings: Sequence[Knobs]
) -> dict[tuple[str, Knobs], Asked]:
    """Every router at every setting; building it once finds out whether it works at these sizes."""
    found = {}
    given = routers if isinstance(routers, Mapping) else {name: find(name) for name in select(routers)}
    for knobs in settings:
        for name, router in given.items():
            row = router if isinstance(router, ZooRow) else ZooRow(router, "", "")
            spec = row.spec if isinstance(routers, Mapping) else fitted(row.spec, knobs.width)
            top_k = row.top_k or knobs.top_k
            with torch.device("meta"):
                RouterStack(spec, top_k, knobs)
            found[name, knobs] = Asked(name=name, spec=spec.to_dict(), top_k=top_k)
    return found


def _finished(
    path: Path | None,
    asked: Mapping[tuple[str, Knobs], Asked],
    plugins: Mapping[str, str],
    progress: Callable[[str], None],
) -> dict[tuple, ProbeRow]:
    if path is None or not path.exists():
        return {}
    rows, problems = read_rows(path)
    for problem in problems:
        progress(f"note: {problem}")
    for row in rows:
        now = asked.get((row.router, row.knobs))
        # As specs: an option that has come since has its default.
        if now is not None and RouterSpec.from_dict(now.spec) != RouterSpec.from_dict(row.router_spec):
            raise RequestError(
                f"{path.name}: {row.router}", "another spec", "what it is now, or another --out"
            )
        if now is not None and row.plugins is not None and row.plugins != _sources(row.router, plugins):
            raise RequestError(
                f"{path.name}: {row.router}",
                "of a plugin that has changed",
                "the plugin as it was, or another --out",
            )
    return {row.key: row for row in rows}


def _sources(router: str, plugins: Mapping[str, str]) -> list[str] | None:
    """What decides a router beside its spec: the sources (sha256) of the plugins, if it is not the package's own."""
    return None if router in OWN else sorted(plugins.values())


def _units(
    asked: Mapping[tuple[str, Knobs], Asked],
    lanes: list[tuple[str, int]],
    done: Mapping[tuple, ProbeRow],
    plugins: tuple[str, ...],
) -> Iterator[ProbeUnit]:
    """Routers that miss the same lanes, a few at a time."""
    missing: dict[tuple, list[Asked]] = {}
    for (name, knobs), router in asked.items():
        lacking = tuple(lane for lane in lanes if (name, *lane, knobs) not in done)
        if lacking:
            missing.setdefault((knobs, lacking), []).append(router)
    for (knobs, lacking), routers in missing.items():
        for first in range(0, len(routers), AT_ONCE):
            yield ProbeUnit(
                routers=routers[first : first + AT_ONCE], lanes=list(lacking), knobs=knobs, plugins=plugins
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine; tensors this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(fields: dict[str, Any], seconds: float, plugins: Mapping[str, str]) -> ProbeRow:
    values = {name: _rounded(value) for name, value in fields.items()}
    return ProbeRow(
        **values,
        seconds=round(seconds, 3),
        code=rmoe.__version__,
        torch=str(torch.__version__),
        plugins=_sources(fields["router"], plugins),
    )


def _rounded(value: Any) -> Any:
    """Floats to six decimals: more is noise, and half as much text again."""
    if isinstance(value, float):
        return round(value, 6)
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def _measured(asked: Asked, ensemble: Ensemble, curve: Curve, worlds: list[World]) -> list[dict[str, Any]]:
    """The fields of a row for each lane."""
    inputs = torch.stack([w.test.inputs for w in worlds])
    routed = ensemble.route(inputs, learns=False, measured=True)
    losses = ensemble.loss(routed, inputs, torch.stack([w.test.targets for w in worlds])).detach()
    rows = []
    for lane, w in enumerate(worlds):
        mine = type(routed)(*(part[lane] for part in routed))
        reference = w.test_reference
        of_lane = curve.regret[:, lane].tolist()
        shares = curve.recurrent_share
        rows.append(
            {
                "router": asked.name,
                "router_spec": asked.spec,
                "probe": w.probe,
                "seed": w.seed,
                "knobs": w.knobs,
                "stacked": 1 if ensemble.note else len(worlds),
                "note": ensemble.note,
                "parameters": ensemble.router_parameters,
                "reference": reference,
                "loss": losses[lane].tolist(),
                "regret": float(regret(losses[lane], reference)),
                "regret_by_layer": regret_by_layer(losses[lane], reference).tolist(),
                "curve_step": curve.step,
                "curve_regret": of_lane,
                "steps_to_half": _first_below(0.5, curve.step, of_lane),
                "steps_to_tenth": _first_below(0.1, curve.step, of_lane),
                "recurrent_share": None if shares is None else float(shares[:, lane].mean()),
                **measures(mine, w.test.classes),
            }
        )
    return rows


def _first_below(bound: float, steps: Sequence[int], regrets: Sequence[float]) -> int | None:
    return next((step for step, value in zip(steps, regrets, strict=True) if value < bound), None)
