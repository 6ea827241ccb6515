"""What a chart is: a plotly figure with its definition, unit and sample size, and the looks all share.

Figures are plain dictionaries in plotly's JSON form. Colours of text, grid and background are set in the
page, by its theme; only the data's own colours stand here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Okabe and Ito (2008), told apart under the common colour deficiencies; yellow left out, it fades on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE_COLOUR = "#8A8F98"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SEQUENTIAL = "Cividis"
SHOWN_AT_FIRST = 8  # lines in one chart; the others wait in its legend
TITLE, TICKS, AXIS_TITLE, LEGEND = 26, 24, 24, 34  # pixels around a panel


@dataclass(frozen=True)
class Selector:
    """What a chart shows one at a time: its reader chooses, in the page.

    Attributes:
        name: what is chosen (`layer`).
        options: as they are called, in order.
        start: index of the one shown first.
        key: of each trace, what the choice changes (`z`).
        values: per trace, in order, `key` for each option.
    """

    name: str
    options: list[str]
    start: int
    key: str
    values: list[list[Any]]


@dataclass(frozen=True)
class Narrow:
    """How a chart of several panels is laid out on a narrow screen."""

    layout: dict[str, Any]
    height: int


@dataclass(frozen=True)
class Chart:
    """One figure of the report.

    Attributes:
        section: heading it stands under.
        definition: what is measured, so that a reader need not look it up.
        sample: how many seeds, tokens or steps are behind it.
        data, layout: plotly's, JSON-ready.
        height: pixels.
        wide: it needs the page's whole width.
        choice: what is shown one at a time.
        narrow: another layout for narrow screens.
    """

    id: str
    section: str
    title: str
    definition: str
    unit: str
    sample: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 380
    wide: bool = False
    choice: Selector | None = None
    narrow: Narrow | None = None

    def for_page(self) -> dict[str, Any]:
        """What the page's script draws it from, and makes its CSV from."""
        found: dict[str, Any] = {"data": self.data, "layout": self.layout, "height": self.height}
        if self.choice:
            found["choice"] = asdict(self.choice)
        if self.narrow:
            found["narrow"] = asdict(self.narrow)
        return found


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

    >>> counted([1], "seed"), counted([2, 2, 3], "seed"), counted([20000], "token"), counted([4], "branch")
    ('1 seed', '2 to 3 seeds', '20,000 tokens', '4 branches')
    """
    low, high = min(numbers), max(numbers)
    figure = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    plural = "es" if noun.endswith("ch") else "s"
    return f"{figure} {noun}" + ("" if high == 1 else plural)


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": label(title)}, "automargin": True, "zeroline": False, **more}


class Panels:
    """A chart of several panels side by side, row by row: their traces and layouts.

    Args:
        titles: of the panels.
        columns: panels in a row, at most; on a narrow screen `narrow_columns`.
        across, down: every panel's axes; the title of `down` stands at the first column alone.
        bottom: the title of `across` stands at the last row alone.
        row_height: of a panel, in pixels.
    """

    def __init__(
        self,
        titles: Sequence[str],
        columns: int,
        across: dict[str, Any],
        down: dict[str, Any],
        gap_x: float = 0.06,
        bottom: bool = False,
        row_height: int = 210,
        narrow_columns: int = 1,
    ) -> None:
        self.titles, self.across, self.down = titles, across, down
        self.gap_x, self.bottom, self.row_height = gap_x, bottom, row_height
        self.data: list[dict[str, Any]] = []
        self.layout, self.height = self._laid_out(columns)
        self.narrow = Narrow(*self._laid_out(narrow_columns))

    def _laid_out(self, columns: int) -> tuple[dict[str, Any], int]:
        """The layout with so many panels in a row, and the chart's height in pixels."""
        columns = min(columns, len(self.titles))
        rows = -(-len(self.titles) // columns)
        above = TITLE + (TICKS if self.bottom else TICKS + AXIS_TITLE)  # between two rows
        inside = rows * self.row_height + (rows - 1) * above
        gap, height = above / inside, self.row_height / inside
        layout: dict[str, Any] = {"annotations": [], "margin": {"t": 36}}
        untitled = {"title": {"text": ""}}
        width = (1 - self.gap_x * (columns - 1)) / columns
        for index, title in enumerate(self.titles):
            row, column = divmod(index, columns)
            left, top = column * (width + self.gap_x), 1 - row * (height + gap)
            x, y = [left, min(left + width, 1.0)], [max(top - height, 0.0), top]
            place, hidden = self._suffix(index), self.bottom and index + columns < len(self.titles)
            layout[f"xaxis{place}"] = {
                **self.across, **(untitled if hidden else {}), "domain": x, "anchor": f"y{place}",
            }  # fmt: skip
            layout[f"yaxis{place}"] = {
                **self.down, **(untitled if column else {}), "domain": y, "anchor": f"x{place}",
            }  # fmt: skip
            layout["annotations"].append(_panel_title(title, x, y))
        return layout, inside + 36 + AXIS_TITLE + TICKS + LEGEND

    @staticmethod
    def _suffix(panel: int) -> str:
        """Of the names of a panel's axes: none, 2, 3, ..."""
        return "" if panel == 0 else str(panel + 1)

    def figure(self) -> dict[str, Any]:
        """What a chart of these panels is drawn from: `data`, `layout` and the fields about its size."""
        size = {"height": self.height, "wide": True, "narrow": self.narrow}
        return {"data": self.data, "layout": self.layout, **size}

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


def numbered_axis(title: str, count: int, **more: Any) -> dict[str, Any]:
    """An axis of things numbered from 0, with a tick on whole numbers only."""
    return axis(title, tickmode="linear", tick0=0, dtick=max(1, count // 8), **more)


def layer_axis(layers: int, **more: Any) -> dict[str, Any]:
    return numbered_axis("layer", layers, **more)
