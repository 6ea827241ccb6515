"""What a chart is: a plotly figure with its definition, unit, sample size and data, and the looks all share.

Figures are plain dictionaries in plotly's JSON form. Colours of text, grid and background are set in the
page, by its theme; only the data's own colours stand here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito (2008), told apart under the common colour deficiencies; yellow left out, it fades on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE_COLOUR = "#8A8F98"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SEQUENTIAL = "Cividis"
SHOWN_AT_FIRST = 8  # lines in one chart; the others wait in its legend


@dataclass(frozen=True)
class Chart:
    """One figure of the report.

    Attributes:
        section: heading it stands under.
        definition: what is measured, so that a reader need not look it up.
        sample: how many seeds, tokens or steps are behind it.
        data, layout: plotly's, JSON-ready.
        rows: the data as a table, first row the header.
        height: pixels.
        wide: it needs the page's whole width.
    """

    id: str
    section: str
    title: str
    definition: str
    unit: str
    sample: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    rows: list[list[Any]]
    height: int = 380
    wide: bool = False

    def csv(self) -> str:
        """The chart's data."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [[spreadsheet_safe(v) for v in row] for row in self.rows]
        )
        return text.getvalue()


def spreadsheet_safe(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula, made inert by a leading apostrophe.

    >>> spreadsheet_safe("=1+1"), spreadsheet_safe(-1.5)
    ("'=1+1", -1.5)
    """
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def label(text: str) -> str:
    """Text for plotly, which reads a few HTML tags (links among them) in labels.

    >>> label("<a href=x>")
    '&lt;a href=x&gt;'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True)
class Style:
    """How one router is drawn, the same in every chart."""

    colour: str
    dash: str

    @property
    def band(self) -> str:
        """The colour as a translucent fill."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.16)"


def styles(names: Iterable[str], baseline: str | None) -> dict[str, Style]:
    """A style per router: grey for the baseline, the palette for the others, dashes when it is used up."""
    found: dict[str, Style] = {}
    others = 0
    for name in names:
        if name == baseline:
            found[name] = Style(BASELINE_COLOUR, "solid")
        else:
            found[name] = Style(PALETTE[others % len(PALETTE)], DASHES[others // len(PALETTE) % len(DASHES)])
            others += 1
    return found


def counted(numbers: Sequence[int], noun: str) -> str:
    """How many, as one number or a range.

    >>> counted([1], "seed"), counted([2, 2, 3], "seed"), counted([20000], "token")
    ('1 seed', '2 to 3 seeds', '20,000 tokens')
    """
    low, high = min(numbers), max(numbers)
    figure = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{figure} {noun}" + ("" if high == 1 else "s")


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": label(title)}, "automargin": True, "zeroline": False, **more}


class Panels:
    """A chart of several panels side by side, row by row: their traces and layout.

    Args:
        titles: of the panels.
        columns: panels in a row, at most.
        across, down: every panel's axes; the title of `down` stands at the first column alone.
        bottom: the title of `across` stands at the last row alone.
    """

    def __init__(
        self,
        titles: Sequence[str],
        columns: int,
        across: dict[str, Any],
        down: dict[str, Any],
        gap_x: float = 0.06,
        gap_y: float = 0.16,
        bottom: bool = False,
    ) -> None:
        columns = min(columns, len(titles))
        self.rows = -(-len(titles) // columns)
        self.data: list[dict[str, Any]] = []
        self.layout: dict[str, Any] = {"annotations": [], "margin": {"t": 36}}
        untitled = {"title": {"text": ""}}
        width = (1 - gap_x * (columns - 1)) / columns
        gap = gap_y / max(self.rows - 1, 1) if self.rows > 2 else gap_y
        height = (1 - gap * (self.rows - 1)) / self.rows
        for index, title in enumerate(titles):
            row, column = divmod(index, columns)
            left, top = column * (width + gap_x), 1 - row * (height + gap)
            x, y = [left, min(left + width, 1.0)], [max(top - height, 0.0), top]
            place, hidden = self._suffix(index), bottom and row + 1 < self.rows
            self.layout[f"xaxis{place}"] = {
                **across, **(untitled if hidden else {}), "domain": x, "anchor": f"y{place}",
            }  # fmt: skip
            self.layout[f"yaxis{place}"] = {
                **down, **(untitled if column else {}), "domain": y, "anchor": f"x{place}",
            }  # fmt: skip
            self.layout["annotations"].append(_panel_title(title, x, y))

    @staticmethod
    def _suffix(panel: int) -> str:
        """Of the names of a panel's axes: none, 2, 3, ..."""
        return "" if panel == 0 else str(panel + 1)

    def add(self, panel: int, trace: dict[str, Any]) -> None:
        """Put a trace onto a panel."""
        place = self._suffix(panel)
        self.data.append({**trace, "xaxis": f"x{place}", "yaxis": f"y{place}"})

    def add_line(self, panel: int, trace: dict[str, Any]) -> None:
        """Put a line onto a panel; the legend shows those of the first."""
        self.add(panel, {**trace, "showlegend": panel == 0})


def _panel_title(text: str, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """A title above one panel."""
    return {
        "text": label(text),
        "x": (x[0] + x[1]) / 2,
        "y": y[1],
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12},
    }


def layer_axis(layers: int, **more: Any) -> dict[str, Any]:
    """An axis of layers, numbered from 0, with a tick on whole numbers only."""
    return axis("layer", tickmode="linear", tick0=0, dtick=max(1, layers // 8), **more)
