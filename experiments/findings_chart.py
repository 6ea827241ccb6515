"""The chart of docs/findings.md, from results/*.jsonl: paired differences in bits per byte with 95% t intervals.

    python -m experiments.findings_chart          writes ../docs/images/findings.png

Needs matplotlib, which is in the extra `docs`, beside what `rmoe` needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.graft_study import MARGIN, GraftRow
from experiments.lines import read_rows
from experiments.study import read_study
from experiments.study_rows import read_study_rows
from experiments.study_table import LOOKS, paired, tests_of
from rmoe.compare.statistics import t_interval

HERE = Path(__file__).parent
WIDTHS = {"study": "width 64", "gpu": "width 256, one GPU", "graft": "a graft, width 64"}
COLOURS = {"study": "#2b6cb0", "gpu": "#dd6b20", "graft": "#718096"}


@dataclass(frozen=True)
class Asked:
    """A difference between two arms of one file of results, each `grid/router`."""

    label: str
    of: str
    minus: str = "std-1/smoe"
    file: str = "study"


CHART: dict[str, list[Asked]] = {
    "RMoE minus SMoE, logits at one scale": [
        Asked("6 layers", "depth-6/rmoe-norm-p32", "depth-6/smoe"),
        Asked("12 layers", "std-1/rmoe-norm-p32"),
        Asked("24 layers", "depth-24/rmoe-norm-p32", "depth-24/smoe"),
        Asked("12 layers, width 256", "std-1/rmoe-norm-p128", file="gpu"),
    ],
    "RMoE minus SMoE, as the paper starts both": [
        Asked("12 layers", "as-they-stand/rmoe-p32", "as-they-stand/smoe"),
        Asked("12 layers, width 256", "as-they-stand/rmoe-p128", "as-they-stand/smoe", "gpu"),
    ],
    "What a memory is worth to its router": [
        Asked("RMoE minus itself without memory", "std-1/rmoe-p32", "std-1/rmoe-np-p32"),
        Asked("RMoE minus itself without the memory's gradient", "std-1/rmoe-p32", "std-1/rmoe-detach-p32"),
        Asked(
            "gated linear minus itself without memory", "std-1/gated-linear-p32", "std-1/gated-linear-np-p32"
        ),
    ],
    "Other routers minus SMoE, logits at one scale": [
        Asked("gated linear", "std-1/gated-linear-p32"),
        Asked("linear with a learned decay (EDA)", "std-1/eda-linear-p32"),
        Asked("a bottleneck of RMoE's width, no memory", "std-1/low-rank-norm-p32"),
        Asked("frozen at random: the positive control", "std-1/random-smoe"),
        Asked("the same, width 256", "std-1/random-smoe", file="gpu"),
    ],
    "Minus SMoE at the learning rate its trial prefers (6e-3)": [
        Asked("gated linear, at 3e-3", "std-1/gated-linear-p32", "rate-6e-3/smoe"),
        Asked("linear with a learned decay (EDA), at 3e-3", "std-1/eda-linear-p32", "rate-6e-3/smoe"),
        Asked("RMoE, at 3e-3", "std-1/rmoe-norm-p32", "rate-6e-3/smoe"),
        Asked("SMoE, at 3e-3", "std-1/smoe", "rate-6e-3/smoe"),
        Asked("frozen at random, at 6e-3: the positive control", "rate-6e-3/random-smoe", "rate-6e-3/smoe"),
    ],
    "SMoE's initial logits, minus those of 1": [
        Asked("0.16", "as-they-stand/smoe"),
        Asked("0.5", "std-0.5/smoe"),
        Asked("2", "std-2/smoe"),
        Asked("0.31, width 256", "as-they-stand/smoe", file="gpu"),
    ],
    "RMoE minus SMoE, both started at": [
        Asked("0.16", "std-0.16/rmoe-norm-p32", "as-they-stand/smoe"),
        Asked("0.5", "std-0.5/rmoe-norm-p32", "std-0.5/smoe"),
        Asked("1", "std-1/rmoe-norm-p32"),
        Asked("2", "std-2/rmoe-norm-p32", "std-2/smoe"),
    ],
    "RMoE's initial logits, minus those of 1": [
        Asked("0.16", "std-0.16/rmoe-norm-p32", "std-1/rmoe-norm-p32"),
        Asked("0.5", "std-0.5/rmoe-norm-p32", "std-1/rmoe-norm-p32"),
        Asked("2", "std-2/rmoe-norm-p32", "std-1/rmoe-norm-p32"),
    ],
    "RMoE's graft minus no graft, on the new text": [
        Asked("OLMoE of 12 layers", "rmoe", "nothing new", "graft"),
    ],
}


def tests_in(file: str) -> dict[str, dict[int, float]]:
    """Arm -> seed -> bits per byte on the test text."""
    results = HERE / "results" / f"{file}.jsonl"
    if file != "graft":
        return tests_of(read_study_rows(results, read_study(HERE / f"{file}.toml").equal_codes))
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(results, GraftRow):
        found[row.way][row.seed] = row.second
    return found


def differences() -> Iterator[tuple[str, list[tuple[Asked, list[float]]]]]:
    """Group -> its differences that have the pairs of a first look, seed by seed; no empty groups."""
    tests = {file: tests_in(file) for file in WIDTHS}
    for group, asked in CHART.items():
        found = [(one, paired(tests[one.file], one.of, one.minus)) for one in asked]
        shown = [(one, pairs) for one, pairs in found if len(pairs) >= LOOKS[0]]
        if shown:
            yield group, shown


def draw(path: Path) -> None:
    """A line per difference: mean, interval, and below it each pair; the margin as a band."""
    import matplotlib.pyplot as plt

    groups = list(differences())
    lines = sum(len(shown) + 1 for _, shown in groups)
    figure, axes = plt.subplots(figsize=(10, 0.3 * lines + 1.4), layout="constrained")
    axes.axvspan(-MARGIN, MARGIN, color="#edf2f7")
    axes.axvline(0, color="#4a5568", linewidth=0.8)
    ticks, at = [], 0
    for group, shown in groups:
        axes.text(0, at, group, transform=axes.get_yaxis_transform(), fontsize=9, weight="bold", va="center")
        at += 1
        for one, pairs in shown:
            colour, interval = COLOURS[one.file], t_interval(pairs)[0]
            mean = sum(pairs) / len(pairs)
            axes.plot([interval.low, interval.high], [at, at], color=colour, linewidth=2)
            axes.plot([mean], [at], "D", color=colour, markersize=5)
            below = [at + 0.3] * len(pairs)
            axes.plot(pairs, below, "o", color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
            figures = f"{mean:+.4f} ({interval.low:.4f} to {interval.high:.4f}), {len(pairs)} pairs"
            axes.text(1.01, at, figures, transform=axes.get_yaxis_transform(), fontsize=8, va="center")
            ticks.append((at, one.label))
            at += 1
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_ylim(at - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("bits per byte; below 0 the first is better. Grey: within 0.005 bits", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    keys = [plt.Line2D([], [], color=COLOURS[file], marker="D", markersize=5) for file in WIDTHS]
    figure.legend(
        keys, WIDTHS.values(), loc="outside lower center", ncols=len(WIDTHS), fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(HERE.parent / "docs" / "images" / "findings.png")
