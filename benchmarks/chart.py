"""The chart of docs/performance.md, from the newest suite in benchmarks/results.

    .venv-docs/bin/python benchmarks/chart.py      writes docs/images/performance.png

Needs matplotlib, which is in the extra `docs`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("medium", "0.9B")
# case -> title, contestants from top to bottom, and the label of each.
PANELS: dict[str, tuple[str, dict[str, str]]] = {
    "step": (
        "Training step",
        {
            "dense, equal active parameters": "dense, equal active params",
            "smoe": "SMoE (rmoe)",
            "rmoe": "RMoE (rmoe)",
            "Mixtral grouped_mm": "Mixtral (transformers)",
            "OLMoE grouped_mm": "OLMoE (transformers)",
            "smoe, compiled": "SMoE, compiled",
            "rmoe, compiled": "RMoE, compiled",
            "OLMoE grouped_mm, compiled": "OLMoE, compiled",
        },
    ),
    "router": (
        "Routers of all layers, forward and backward",
        {
            "smoe": "linear (SMoE)",
            "rmoe": "GRU (RMoE)",
            "rmoe, compiled": "GRU, compiled",
            "ZAYA1 (transformers, k = 1)": "ZAYA1 (transformers)",
        },
    ),
    "block": (
        "Experts of one layer, forward and backward",
        {
            "sorted_mm": "sorted_mm (rmoe)",
            "transformers grouped_mm": "grouped_mm (transformers)",
            "per-expert loop": "loop over modules",
            "transformers eager": "eager (transformers)",
        },
    ),
    "decode 1": (
        "Decode step, one sequence",
        {
            "smoe": "SMoE (rmoe)",
            "rmoe": "RMoE (rmoe)",
            "OLMoE eager": "OLMoE, eager",
            "OLMoE grouped_mm": "OLMoE, grouped_mm",
            "smoe, compiled": "SMoE, compiled",
            "rmoe, compiled": "RMoE, compiled",
            "OLMoE batched_mm, compiled": "OLMoE, compiled batched_mm",
            "OLMoE grouped_mm, compiled": "OLMoE, compiled grouped_mm",
        },
    ),
}
PARTS = (("product_ms", "matrix products", "#2b6cb0"), ("attention_ms", "attention", "#63b3ed"))


def label(milliseconds: float) -> str:
    return f" {milliseconds:,.0f}" if milliseconds >= 100 else f" {milliseconds:.3g}"


def draw(axes: Axes, rows: dict[str, dict[str, Any]], labels: dict[str, str]) -> None:
    """One panel: a bar per contestant, split where the profile split it, and the roofline as a line."""
    shown = [name for name in labels if name in rows]
    for place, name in enumerate(shown):
        row, start = rows[name], 0.0
        for field, _, colour in PARTS:
            if row.get(field):
                axes.barh(place, row[field], left=start, color=colour)
                start += row[field]
        rest = row["wall_ms"] - start
        axes.barh(place, rest, left=start, color="#cbd5e0" if start else "#718096")
        axes.text(row["wall_ms"], place, label(row["wall_ms"]), va="center", fontsize=8)
        if row.get("roofline_ms"):
            axes.plot([row["roofline_ms"]] * 2, [place - 0.4, place + 0.4], color="#c53030", linewidth=1.5)
    axes.set_yticks(range(len(shown)), [labels[name] for name in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(row["wall_ms"] for name, row in rows.items() if name in shown))
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw every panel of the newest suite."""
    suite = json.loads(max((ROOT / "benchmarks" / "results").glob("*-suite.json")).read_text())
    found = {(entry["case"], entry["size"]["name"]): entry for entry in suite["results"] if entry["size"]}
    heights = [len(labels) + 1.5 for _, labels in PANELS.values()]
    figure, grid = plt.subplots(
        len(PANELS), len(SIZES), figsize=(12, 11), height_ratios=heights, layout="constrained"
    )
    for line, (case, (title, labels)) in enumerate(PANELS.items()):
        for column, size in enumerate(SIZES):
            rows = {row["contestant"]: row for row in found[case, size]["rows"]}
            draw(grid[line, column], rows, labels)
            grid[line, column].set_title(f"{title}, {size} (ms)", fontsize=10, loc="left")
    keys = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, _, colour in PARTS]
    keys += [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#cbd5e0", "#718096")]
    keys.append(plt.Line2D([], [], color="#c53030"))
    names = [name for _, name, _ in PARTS] + ["everything else", "not split by the profile", "roofline"]
    figure.legend(keys, names, loc="outside lower center", ncols=5, fontsize=9)
    hardware = suite["hardware"]
    figure.suptitle(
        f"{suite['date']}, {hardware['cpu']}, {hardware['cores']} cores, float32, no GPU", fontsize=10
    )
    figure.savefig(ROOT / "docs" / "images" / "performance.png", dpi=110)


if __name__ == "__main__":
    main()
