"""Run the registered cases and write one dated JSON file and one table.

    python -m benchmarks.suite [--sizes quick medium 0.9B] [--cases step block ...] [--rounds 20] [--out DIR]

Ratios are medians of pairs taken round by round in one run. A case is refused while its tests are red.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.cases import CASES, Case, Setting
from benchmarks.measure import measure_roofline
from benchmarks.sizes import ON_CPU, ON_GPU
from rmoe.training.environment import hardware, versions

ROOT = Path(__file__).resolve().parents[1]
OF_NO_SIZE = ("start-up",)
COLUMNS = (
    "contestant", "wall_ms", "cpu_ms", "ratio", "roofline_ms", "share_of_roofline", "tokens_per_s", "peak_mib", "extra",
    "extra_by_roofline",
)  # fmt: skip


def tests_are_green(case: Case, seen: dict[str, bool]) -> bool:
    """Run a case's tests, each path once for all cases."""
    for path in case.tests:
        if path not in seen:
            command = [sys.executable, "-m", "pytest", "-q", "-x", path]
            seen[path] = subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    return all(seen[path] for path in case.tests)


def run_cases(cases: list[str], settings: list[Setting], check_tests: bool = True) -> list[dict[str, Any]]:
    """Each case at each size: `{case, size, compiled, rows}`, or `{case, refused}`."""
    results: list[dict[str, Any]] = []
    seen: dict[str, bool] = {}
    for name in cases:
        if check_tests and not tests_are_green(CASES[name], seen):
            results.append({"case": name, "refused": f"tests are red: {', '.join(CASES[name].tests)}"})
            continue
        for setting in settings[:1] if name in OF_NO_SIZE else settings:
            print(f"{name}, {setting.size.name}", file=sys.stderr, flush=True)
            size = None if name in OF_NO_SIZE else vars(setting.size)
            rows = CASES[name].measure(setting)
            results.append(
                {
                    "case": name,
                    "size": size,
                    "compiled": setting.compiled,
                    "rows": rows,
                    "load": os.getloadavg()[0],
                }
            )
    return results


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine, roofline = report["hardware"], report["roofline"]
    gpu = machine["accelerator"] or "none, not measured on a GPU"
    lines = [
        f"# Benchmarks, {report['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads; GPU: {gpu}; "
        f"{', '.join(f'{k} {v}' for k, v in report['versions']['libraries'].items())}; "
        f"code {report['versions']['code']}.",
        f"Roofline: {roofline['gflops']:.0f} GFLOP/s in matrix products, {roofline['gbytes']:.1f} GB/s copied. "
        f"Medians of {report['rounds']} rounds; `ratio` is paired, over the first row of its table.",
    ]
    for result in report["results"]:
        if "refused" in result:
            lines += ["", f"## {result['case']}: refused", "", result["refused"]]
            continue
        size = result["size"]
        of = (
            ""
            if size is None
            else f", {size['name']} ({size['layers']} layers, {size['batch']} x {size['length']} tokens)"
        )
        lines += ["", f"## {result['case']}{of}{', compiled' if result['compiled'] else ''}", ""]
        columns = [c for c in COLUMNS if any(c in row for row in result["rows"])]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in result["rows"]:
            cells = [row.get(c, "") for c in columns]
            lines.append(
                "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |"
            )
    return "\n".join(lines) + "\n"


def make_report(cases: list[str], settings: list[Setting], rounds: int, check_tests: bool) -> dict[str, Any]:
    """Measure, with what the figures come from."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rounds": rounds,
        "roofline": settings[0].roofline._asdict(),
        "hardware": msgspec.to_builtins(hardware(torch.get_num_threads())),
        "versions": msgspec.to_builtins(versions()),
        "results": run_cases(cases, settings, check_tests),
    }


def write_report(report: dict[str, Any], folder: Path, name: str) -> Path:
    """`<date>-<name>.json` and `.md`; gives the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{report['date']}-{name}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(report))
    return stem.with_suffix(".md")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(ON_CPU), default=["quick", "medium", "0.9B"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="cases step and decode through torch.compile")
    parser.add_argument(
        "--without-tests", action="store_true", help="measure even if tests are red; not for publishing"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="suite")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    roofline = measure_roofline(device, dtype)
    sizes = ON_GPU if device == "cuda" else ON_CPU
    settings = [
        Setting(sizes[name], device, roofline, chosen.rounds, device == "cuda", chosen.compiled)
        for name in chosen.sizes
    ]
    report = make_report(chosen.cases, settings, chosen.rounds, not chosen.without_tests)
    table = write_report(report, chosen.out, chosen.name)
    print(table.read_text())
    if any("refused" in result for result in report["results"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
