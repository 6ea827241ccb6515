"""A report of the suite as JSON and as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = {
    "contestant": "contestant",
    "wall_ms": "ms",
    "cpu_ms": "processor ms",
    "ratio": "ratio",
    "spread": "+/-",
    "tokens_per_s": "tokens/s",
    "roofline_ms": "roofline ms",
    "share_of_roofline": "share of roofline",
    "product_ms": "ms in products",
    "attention_ms": "in attention",
    "products_share_of_rate": "products / matrix rate",
    "extra": "extra",
    "extra_by_roofline": "extra by roofline",
    "peak_mib": "peak MiB",
    "memory_ratio": "memory ratio",
}
MEMORY = {
    "tensors": "memory is what torch's tensors took at their peak, parameters, gradients and optimizer included",
    "resident": "memory is what the process grew by",
    "child": "memory is the command's resident memory",
}


def write_report(report: dict[str, Any], path: Path) -> None:
    """The JSON file, and beside it the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    machine = report["hardware"]
    libraries = ", ".join(f"{k} {v}" for k, v in report["versions"]["libraries"].items())
    lines = [
        f"# Benchmarks, {report['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB; "
        f"GPU: {machine['accelerator'] or 'none, not measured on a GPU'}; {libraries}; "
        f"code {report['versions']['code']}.",
        "",
        "`ratio` is the median of wall-clock ratios paired round by round, over the table's first row; `+/-` half the "
        "distance between their quartiles. `roofline` is the least time by count: FLOPs of matrix products over the "
        "rate of a large product, or bytes over the bandwidth of a large copy, measured right before and after.",
    ]
    for result in report["results"]:
        lines += ["", *_section(result)]
    if report.get("left_out"):
        lines += ["", f"Not reached in time: {'; '.join(report['left_out'])}."]
    if "training" in report:
        lines += ["", "## Training at the medium size", "", *_table(report["training"])]
    if "checks" in report:
        lines += ["", *_checks(report["checks"])]
    return "\n".join(lines) + "\n"


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    """Those that failed, or the five that came nearest to it."""
    failed = [check for check in checks if not check["passed"]]
    nearest = [] if failed else sorted(checks, key=lambda check: -check["error"] / check["allowed"])[:5]
    head = f"## Against float64: {len(checks) - len(failed)} of {len(checks)} within bounds"
    return [head, "", *_table(failed or nearest)]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows with the same keys, which become the head."""
    if not rows:
        return []
    head = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return head + ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]


def _section(result: dict[str, Any]) -> list[str]:
    if "refused" in result:
        return [f"## {result['case']}: refused", "", result["refused"]]
    size, said = result["size"], []
    of = "" if size is None else f", {size['name']} ({_shape(size)})"
    columns = [column for column in COLUMNS if any(column in row for row in result["rows"])]
    if "roofline" in result:
        roofline = result["roofline"]
        said = [
            f"{result['rounds']} rounds",
            f"{roofline['gflops']:.0f} GFLOP/s",
            f"{roofline['gbytes']:.1f} GB/s",
            f"others kept {result['others_cores']} cores busy",
        ]
    said.append(MEMORY[result["memory"]] if "memory" in result else "memory not measured")
    lines = [
        f"## {result['case']}{of}",
        "",
        f"{'; '.join(said)}.",
        "",
        "| " + " | ".join(COLUMNS[column] for column in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    return lines + [
        "| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in result["rows"]
    ]


def _shape(size: dict[str, Any]) -> str:
    return (
        f"{size['layers']} layers of {size['hidden']}, {size['experts']} experts of {size['width']}, "
        f"top-{size['top_k']}, {size['batch']} x {size['length']} tokens"
    )


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
