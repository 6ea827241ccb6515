"""`--gate`: a router is better when it is better at two sizes, or it is not better. Imports no torch.

One size is easily an accident of its learning rate, its depth or its initialisation. At each size the verdict at equal
time counts where it was measured at both, else the one at equal steps.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from rmoe.compare import plan as plans
from rmoe.compare.plan import ComparisonPlan, ComparisonRecord
from rmoe.records import read_record
from rmoe.results.comparison import SUMMARY_VERSION, Difference, RouterSummary, Summary
from rmoe.training.config import RunConfig
from rmoe.validation import require

BETTER = ("better", "better by less than the margin")


def read_other(folder: Path, plan: ComparisonPlan) -> Summary:
    """The finished comparison at the other size.

    Raises:
        RequestError: there is none, its baseline is another, or it is of the same size.
    """
    record = read_record(folder / plans.COMPARISON, ComparisonRecord, plans.COMPARISON_VERSION)
    summary = read_record(folder / plans.SUMMARY, Summary, SUMMARY_VERSION)
    named = f"{folder} (baseline {summary.baseline})"
    require(summary.baseline == plan.baseline, "--gate", named, f"one with baseline {plan.baseline}")
    # Settings that came after it was begun have their defaults.
    stored = RunConfig.from_dict(record.config).to_dict()["model"]
    other = stored != plan.config.to_dict()["model"]
    require(other, "--gate", str(folder), "a comparison at another size: its model is this one's")
    return summary


def gated(summary: Summary, other: Summary) -> Summary:
    """The summary with each router's verdict over both sizes."""
    there = {router.router: router for router in other.routers}
    routers = [_gated(router, there.get(router.router)) for router in summary.routers]
    passed = [router.router for router in routers if router.gate == "better"]
    failed = [router.router for router in routers if router.gate == "not better"]
    note = f"Better at both sizes: {', '.join(passed) or 'none'}; not better: {', '.join(failed) or 'none'}."
    return msgspec.structs.replace(summary, routers=routers, notes=[note, *summary.notes])


def _gated(here: RouterSummary, there: RouterSummary | None) -> RouterSummary:
    if here.difference is None or there is None or there.difference is None:
        return here
    pair: tuple[Difference, Difference] = (here.difference, there.difference)
    if here.equal_time is not None and there.equal_time is not None:
        pair = (here.equal_time.difference, there.equal_time.difference)
    better = all(difference.verdict in BETTER for difference in pair)
    return msgspec.structs.replace(here, gate="better" if better else "not better")
