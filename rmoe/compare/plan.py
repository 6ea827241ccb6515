"""What a comparison is: which runs, in which folders, and whether a folder already holds another one.

    DIR/comparison.json     what is compared, all but which routers and how many seeds: those may grow
    DIR/run.lock            held while a comparison goes on; see `rmoe.training.run_folder`
    DIR/results.jsonl       one line per finished or failed run
    DIR/branches.jsonl      the baseline's shorter runs, where a law of its loss was asked for
    DIR/runs/<key>/         each run's own folder
    DIR/summary.json, summary.md, analysis.json, report/

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from rmoe.compare.sequential import Looks
from rmoe.errors import RequestError
from rmoe.records import Record, read_record, write_record
from rmoe.results.rows import SweepValue, run_key
from rmoe.routing.zoo import find
from rmoe.training.config import RunConfig
from rmoe.training.run_folder import LOCK, flat, locked, refuse_other, require_equal

COMPARISON, RESULTS, SUMMARY, ANALYSIS = "comparison.json", "results.jsonl", "summary.json", "analysis.json"
BRANCHES = "branches.jsonl"
LENGTH = "training.max_steps"
COMPARISON_VERSION = 1

# Settings that may differ when a comparison is gone on with: none decides a result.
MAY_DIFFER = frozenset({"preset", "router", "data.path", "data.cache_dir", "data.download", "training.seed"})


@dataclass(frozen=True)
class Run:
    """One model to train."""

    router: str
    seed: int
    sweep: dict[str, SweepValue]
    config: RunConfig

    @property
    def key(self) -> str:
        return run_key(self.router, self.seed, self.sweep)


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison.

    Attributes:
        config: of every run, but for router, seed and what is swept.
        routers: names; the first is the baseline where `baseline` says nothing else.
        seeds: how many, from the configuration's own on.
        baseline: the router the others are compared with.
        sweep: setting -> values; every router is trained at every combination.
        changes: router -> settings it alone has: expert widths that match parameters, or its only `k`.
        optional: routers nobody named, which `all` stood for: left out where they cannot work.
        looks: numbers of pairs at which the verdicts are looked at; None is once, at all of them.
        decided: router -> pairs after which it gets no more: its verdict stands, or its runs fail.
        lengths: of the baseline's runs that branch from those of the plan.
    """

    config: RunConfig
    routers: tuple[str, ...]
    seeds: int
    baseline: str
    sweep: dict[str, tuple[SweepValue, ...]] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    looks: Looks | None = None
    decided: dict[str, int] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    def runs(self) -> list[Run]:
        """Every run, seed by seed, so that an interrupted comparison has whole pairs."""
        first = self.config.training.seed
        return [
            Run(router, seed, point, self.config_of(router, seed, point))
            for seed in range(first, first + self.seeds)
            for point in self.points()
            for router in self.routers
            if seed - first < self.decided.get(router, self.seeds)
        ]

    def points(self) -> list[dict[str, SweepValue]]:
        """Every combination of what is swept; without a sweep the empty one."""
        return [dict(zip(self.sweep, values, strict=True)) for values in product(*self.sweep.values())]

    def branches(self) -> list[tuple[Run, Run]]:
        """(shorter run, the run of the plan it branches from) of the baseline, seed by seed."""
        return [
            (Run(run.router, run.seed, {LENGTH: length}, run.config.shorter(length)), run)
            for run in self.runs()
            if run.router == self.baseline
            for length in self.lengths
        ]

    def config_of(self, router: str, seed: int, point: dict[str, SweepValue]) -> RunConfig:
        """The configuration of one run. With a sweep the test split waits until a point is chosen."""
        config = self.config.with_setting("router", router).with_setting("training.seed", seed)
        for name, value in (self.changes.get(router, {}) | point).items():
            config = config.with_setting(name, value)
        return config.with_setting("logging.test", not self.sweep)


def parse_sweep(config: RunConfig, asked: Sequence[str]) -> dict[str, tuple[SweepValue, ...]]:
    """`("learning_rate=1e-3,3e-3",)` as setting -> values of the setting's type.

    Raises:
        RequestError: not of that form, an unknown setting, one given twice, one that makes no other run or no run to
            compare, or a value that is not allowed.
    """
    sweep: dict[str, tuple[SweepValue, ...]] = {}
    swept: set[str] = set()
    for one in asked:
        name, separator, values = one.partition("=")
        if not separator or not values:
            raise RequestError("--sweep", one, "SETTING=VALUE,VALUE,...")
        if name.rpartition(".")[2] in ("seed", "router"):
            raise RequestError(
                "--sweep", one, "any setting but seed and router: --seeds and --routers do that"
            )
        full, _ = config.setting(name)
        if full.startswith("data."):
            raise RequestError("--sweep", one, "a setting that leaves the text as it is")
        if full.partition(".")[0] in ("preset", "plugin", "logging", "parallel", "checkpoints"):
            raise RequestError("--sweep", one, "a setting of the model or its training")
        if full in swept:
            raise RequestError(
                "--sweep", one, f"each setting once, with all its values: {full}=VALUE,VALUE,..."
            )
        swept.add(full)
        sweep[name] = tuple(dict.fromkeys(_read(config, name, text) for text in values.split(",")))
    return sweep


def _read(config: RunConfig, name: str, text: str) -> SweepValue:
    """A setting's value as its type has it."""
    _, value = config.with_setting(name, text).setting(name)
    if not isinstance(value, SweepValue):
        raise RequestError("--sweep", f"{name}={text}", "a setting with a single value")
    return value


def only_k(routers: Iterable[str], config: RunConfig) -> dict[str, dict[str, Any]]:
    """Changes for routers that are defined for one number of experts per token, which is not the preset's."""
    own = {name: find(name).top_k for name in routers}
    return {
        name: {"model.num_experts_per_tok": k}
        for name, k in own.items()
        if k is not None and k != config.model.num_experts_per_tok
    }


class ComparisonRecord(Record, frozen=True, kw_only=True):
    """`comparison.json`."""

    schema_version: int = COMPARISON_VERSION
    config: dict[str, Any]
    sweep: dict[str, list[SweepValue]]
    changes: dict[str, dict[str, Any]]
    data_sha256: str
    looks: list[int] | None = None
    plugins: dict[str, str] | None = None
    engine: str = "local"


def enter(
    folder: Path,
    plan: ComparisonPlan,
    data_sha256: str,
    plugins: dict[str, str] | None = None,
    engine: str = "local",
) -> list[str]:
    """Begin a comparison in a folder, or make sure that the one there is this one.

    Args:
        plugins: plugin -> sha256 of its source, as `load_plugins` gives it.
        engine: what carries its runs out; it may change.

    Returns:
        What a change of the engine does, as notes.

    Raises:
        RequestError: the folder holds something else, or another comparison; the first difference is named.
    """
    record = ComparisonRecord(
        config=plan.config.to_dict(),
        sweep={name: list(values) for name, values in plan.sweep.items()},
        changes=plan.changes,
        data_sha256=data_sha256,
        looks=None if plan.looks is None else list(plan.looks),
        plugins=plugins,
        engine=engine,
    )
    _refuse_other(folder)
    if (folder / COMPARISON).exists():
        stored = read_record(folder / COMPARISON, ComparisonRecord, COMPARISON_VERSION)
        # Settings that came after it was begun have their defaults.
        stored = msgspec.structs.replace(stored, config=RunConfig.from_dict(stored.config).to_dict())
        _require_same(folder, stored, record, plan.routers)
        changes = stored.changes | record.changes
        write_record(folder / COMPARISON, msgspec.structs.replace(record, changes=changes))
        if stored.engine == engine:
            return []
        return [
            f"The grid was begun on {stored.engine} and is continued on {engine}: finished runs stay, the others "
            "resume from their checkpoints. Rounding may differ between machines, so a run's bits may, too."
        ]
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / COMPARISON, record)
    return []


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder if needed and hold its lock: one comparison at a time in a folder.

    Raises:
        RequestError: another process holds it, or the folder has something else in it and is left as it is.
    """
    _refuse_other(folder)
    with locked(folder):
        yield


def _refuse_other(folder: Path) -> None:
    allowed = "a new or empty folder, or one with a comparison to go on with"
    refuse_other(folder, COMPARISON, {LOCK, f"{COMPARISON}.part"}, allowed)


def _require_same(
    folder: Path, stored: ComparisonRecord, now: ComparisonRecord, routers: Iterable[str]
) -> None:
    # The text's hash covers the tokenizer's content, wherever that lies now.
    may_differ = MAY_DIFFER | ({"data.tokenizer"} if stored.data_sha256 == now.data_sha256 else frozenset())
    # Of plugins the content decides, not where they lie; earlier releases did not keep it.
    if stored.plugins is not None and now.plugins is not None:
        if sorted(stored.plugins.values()) != sorted(now.plugins.values()):
            allowed = f"of the content (sha256) that the comparison in {folder} was started with"
            raise RequestError("plugin", ", ".join(now.plugins) or None, allowed)
        may_differ |= {"plugin"}
    was, new = (
        flat(each.config) | {"looks": each.looks, "sweep": each.sweep, "text (sha256)": each.data_sha256}
        for each in (stored, now)
    )
    require_equal(was, new, may_differ, f"the comparison in {folder}")
    for router in routers:  # one that has no run yet may come with other settings of its own, or none
        was_own, own = stored.changes.get(router, {}), now.changes.get(router, {})
        begun = router in stored.changes or any((folder / "runs").glob(f"{router}-seed*"))
        if begun and was_own != own:
            allowed = f"{was_own}, as the comparison in {folder} was started (--match-params, --baseline)"
            raise RequestError(f"settings of {router}", own, allowed)
