"""Run the registered cases and write one dated JSON file and one table.

    python -m benchmarks.suite [--cases step block ...] [--sizes quick medium 0.9B] [--only smoe rmoe ...]
                               [--rounds 20] [--out DIR] [--name suite] [--eager] [--parts times memory]

Ratios are medians of pairs taken round by round in one run. A case is refused while its tests are red. The whole is
about an hour on two cores; called several times with a part each and the same --name, it adds to that day's file,
what is measured again taking the place of what was there. Each case says the roofline of its own minutes, and each
row's ratio is to the first contestant in the same minutes. Times want a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.cases import CASES, COMPILED, Case, Contestants, Setting, setting_for
from benchmarks.measure import (
    ROOT,
    Roofline,
    compare,
    kernel_ms,
    measure_roofline,
    peak_in_own_process,
)
from benchmarks.report import write_report
from benchmarks.sizes import ON_CPU
from rmoe.training.environment import hardware, versions

Row = dict[str, Any]
Calls = dict[str, Callable[[], object]]
PARTS = ("times", "memory")


def tests_are_green(case: Case, seen: dict[str, bool]) -> bool:
    """Run a case's tests, each path once for all cases."""
    for path in case.tests:
        if path not in seen:
            command = [sys.executable, "-m", "pytest", "-q", "-x", path]
            seen[path] = subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    return all(seen[path] for path in case.tests)


def chosen(contestants: Contestants, only: Sequence[str], eager: bool) -> Contestants:
    """The first contestant, by which the others' times are divided, and those asked for."""
    first, *_ = contestants
    return {
        name: contestant
        for name, contestant in contestants.items()
        if name == first or ((not only or name in only) and not (eager and name.endswith(COMPILED)))
    }


def groups(names: Sequence[str], together: int) -> list[list[str]]:
    """At most `together` at a time, the first in each."""
    first, *others = names
    step = max(1, together - 1)
    return [[first, *others[i : i + step]] for i in range(0, len(others), step)] or [[first]]


def memory_of(case: Case, setting: Setting, contestants: Contestants) -> Row:
    """Peak memory alone, which a busy machine does not change: `{case, size, memory, rows}`."""
    threads = torch.get_num_threads()
    rows: list[Row] = []
    for name in contestants:
        mib = peak_in_own_process(case.name, setting.size.name, setting.device, name, threads)
        rows.append({"contestant": name, "peak_mib": mib})
        rows[-1]["memory_ratio"] = mib / max(rows[0]["peak_mib"], 1e-9)
    kind = next(iter(contestants.values())).memory
    return {
        "case": case.name,
        "size": vars(setting.size) if case.sized else None,
        "memory": kind,
        "rows": rows,
    }


def measure(case: Case, setting: Setting, contestants: Contestants, rounds: int) -> Row:
    """Times of all, paired: `{case, size, roofline, rounds, rows, ...}`."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    started, roofline, rows = time.monotonic(), measure_roofline(setting.device, dtype), {}
    disturbed = 0.0
    for names in groups(list(contestants), setting.size.together):
        calls, peaks = build(contestants, names, setting.device)
        timings, others = compare(calls, rounds, setting.device)
        disturbed = max(disturbed, others)
        for name in names:
            if name in rows:
                continue
            rows[name] = {"contestant": name, **timings[name]._asdict()}
            if name in peaks:
                rows[name]["peak_mib"] = peaks[name]
            if case.products and not name.endswith(COMPILED):  # whose kernels have no names of their own
                rows[name] |= kernel_ms(calls[name], setting.device, dtype)
        del calls
        forget()
    roofline = roofline.best(measure_roofline(setting.device, dtype))
    if peaks:
        first = rows[next(iter(rows))]["peak_mib"]
        for row in rows.values():
            row["memory_ratio"] = row["peak_mib"] / first
    for name, row in rows.items():
        beside(row, contestants[name].phases, contestants[name].tokens, roofline)
    return {
        "case": case.name,
        "size": vars(setting.size) if case.sized else None,
        "roofline": roofline._asdict(),
        "rounds": rounds,
        **({"memory": "tensors"} if peaks else {}),
        "others_cores": round(disturbed, 2),
        "seconds": round(time.monotonic() - started),
        "rows": list(rows.values()),
    }


def build(contestants: Contestants, names: Sequence[str], device: str) -> tuple[Calls, dict[str, float]]:
    """The calls; on a GPU also what each one's tensors take at their peak in three calls, MiB, by its allocator."""
    calls: Calls = {}
    peaks: dict[str, float] = {}
    for name in names:
        if device != "cuda" or contestants[name].memory != "tensors":
            calls[name] = contestants[name].build()
            continue
        before = torch.cuda.memory_allocated()
        calls[name] = contestants[name].build()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            calls[name]()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return calls, peaks


def beside(row: Row, phases: Sequence[Any], tokens: int | None, roofline: Roofline) -> None:
    """Put the roofline and the rate beside a row's time."""
    if phases:
        row["roofline_ms"] = 1e3 * roofline.seconds(*phases)
        row["share_of_roofline"] = row["roofline_ms"] / row["wall_ms"]
        row["gflops"] = sum(work.flops for work in phases) / 1e9
    room = row.pop("product_room_gflop", 0.0)
    if phases and room and not row["attention_ms"]:  # then products are all there is to count
        row["products_share_of_rate"] = row["gflops"] / room
    if tokens is not None:
        row["tokens_per_s"] = tokens / (row["wall_ms"] / 1e3)


def forget() -> None:
    """Free what the last group held: compiled graphs keep their models."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def extra_of_the_router(result: Row, setting: Setting) -> None:
    """What RMoE's step takes beyond SMoE's, beside the roofline of the FLOPs that it adds."""
    size, rows = setting.size, {row["contestant"]: row for row in result["rows"]}
    flops = 3.0 * size.tokens * (size.router_flops("rmoe") - size.router_flops("smoe"))
    least_ms = flops / result["roofline"]["gflops"] / 1e6
    for ending in ("", COMPILED):
        smoe, rmoe = rows.get("smoe" + ending), rows.get("rmoe" + ending)
        if smoe and rmoe:
            rmoe["extra"] = rmoe["ratio"] / smoe["ratio"] - 1
            rmoe["extra_by_roofline"] = least_ms / smoe["wall_ms"]


def run_cases(
    cases: Sequence[str],
    sizes: Sequence[str],
    device: str,
    rounds: int,
    *,
    only: Sequence[str] = (),
    eager: bool = False,
    parts: Sequence[str] = PARTS,
    check_tests: bool = True,
    each: Callable[[Row], None] = lambda result: None,
) -> list[Row]:
    """Each case at each size; `each` is told every result as it comes. A refused case is `{case, refused}`."""
    results: list[Row] = []
    seen: dict[str, bool] = {}
    for name in cases:
        if check_tests and not tests_are_green(CASES[name], seen):
            results.append(
                {"case": name, "size": None, "refused": f"tests are red: {', '.join(CASES[name].tests)}"}
            )
            each(results[-1])
            continue
        for size in sizes if CASES[name].sized else sizes[:1]:
            setting = setting_for(size, device)
            contestants = chosen(CASES[name].contestants(setting), only, eager)
            for part in parts:
                print(f"{part} of {name}, {size}", file=sys.stderr, flush=True)
                if part == "times":
                    results.append(measure(CASES[name], setting, contestants, rounds))
                    if name == "step":
                        extra_of_the_router(results[-1], setting)
                elif device == "cpu" or next(iter(contestants.values())).memory != "tensors":
                    results.append(memory_of(CASES[name], setting, contestants))
                else:
                    continue  # `build` has seen to it
                each(results[-1])
    return results


def new_report(rounds: int) -> Row:
    """What the figures come from; `results` is still empty."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rounds": rounds,
        "hardware": msgspec.to_builtins(hardware(torch.get_num_threads())),
        "versions": msgspec.to_builtins(versions()),
        "results": [],
    }


def merge(report: Row, result: Row) -> None:
    """Put a result in: its rows take the place of those of the same case, size and contestant, field by field."""

    def key(one: Row) -> tuple[str, str | None]:
        return one["case"], one["size"]["name"] if one["size"] else None

    old = next((one for one in report["results"] if key(one) == key(result)), {})
    if "rows" in old and "rows" in result:
        rows = {row["contestant"]: row for row in old["rows"]}
        for row in result["rows"]:
            kept = rows.get(row["contestant"], {})
            if "wall_ms" in row:  # all that was timed with it is measured anew
                kept = {name: kept[name] for name in ("peak_mib", "memory_ratio") if name in kept}
            rows[row["contestant"]] = {**kept, **row}
        result = {**old, **result, "rows": list(rows.values())}
    report["results"] = [one for one in report["results"] if key(one) != key(result)] + [result]
    order, names = [*CASES], [*ON_CPU, None]
    report["results"].sort(key=lambda one: (order.index(one["case"]), names.index(key(one)[1])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sizes", nargs="+", choices=list(ON_CPU), default=["quick", "medium", "0.9B"])
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="contestants, beside the first")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="a GPU takes both at once"
    )
    parser.add_argument(
        "--without-tests", action="store_true", help="measure even if tests are red; not for publishing"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="suite")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = new_report(options.rounds)
    path = options.out / f"{report['date']}-{options.name}.json"
    if path.exists():
        report["results"] = json.loads(path.read_text())["results"]
    code = report["versions"]["code"]

    def keep(result: Row) -> None:
        merge(report, {**result, "code": code})
        write_report(report, path)

    results = run_cases(
        options.cases,
        options.sizes,
        device,
        options.rounds,
        only=options.only,
        eager=options.eager,
        parts=options.parts,
        check_tests=not options.without_tests,
        each=keep,
    )
    print(path.with_suffix(".md").read_text())
    if any("refused" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
