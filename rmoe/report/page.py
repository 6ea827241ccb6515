"""One HTML page from `summary.json` and `analysis.json`, readable offline from disk.

Everything that comes from outside (router names, notes, tokens) is escaped: Jinja's autoescape in markup, `<`
as an escape inside the JSON that the scripts read, `textContent` in the scripts, `charts.chart.label` for
plotly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rmoe.records import atomic_write
from rmoe.report import table
from rmoe.report.charts.chart import Chart, counted, styles
from rmoe.report.charts.comparison import comparison_charts
from rmoe.report.charts.routing import routing_charts
from rmoe.report.explorer import explorer_data
from rmoe.report.overview import overview
from rmoe.results.analysis import Analysis
from rmoe.results.comparison import UNITS, Summary
from rmoe.results.packed import pack

PLOTLY = "plotly.min.js"
EXPLORER = "Token explorer"
VERDICT = "Verdict"
PACKED_FROM = 256
"""Entries of a list that the page holds packed; `unpack.js` gives them back."""


def write_report(
    folder: Path, summary: Summary | None, analysis: Analysis | None, single_file: bool = False
) -> Path:
    """Write `index.html` (and plotly beside it, unless `single_file`) into `folder`.

    Args:
        summary: of a comparison; None for the report of one model.
        analysis: of its models; None when none was made.
        single_file: inline plotly, 4.8 MB, so that the page can be sent alone.

    Returns:
        The page's path.
    """
    return written(folder, lambda plotly: render(summary, analysis, plotly), single_file)


def written(folder: Path, rendered: Callable[[str | None], str], single_file: bool) -> Path:
    """Write a page made by `rendered(plotly's source to inline, or None)`, and plotly beside it unless inlined."""
    folder.mkdir(parents=True, exist_ok=True)
    inlined = None
    with as_file(files("plotly") / "package_data" / PLOTLY) as plotly:
        if single_file:
            inlined = plotly.read_text(encoding="utf-8")
        else:
            with atomic_write(folder / PLOTLY, alone=False) as staged:
                shutil.copyfile(plotly, staged)
    page = folder / "index.html"
    with atomic_write(page, alone=False) as staged:
        staged.write_text(rendered(inlined), encoding="utf-8")
    return page


def render(summary: Summary | None, analysis: Analysis | None, plotly: str | None = None) -> str:
    """The page's HTML.

    Args:
        plotly: the plotting library's source, to be inlined; None links to the file beside the page.
    """
    charts = all_charts(summary, analysis)
    explorer = explorer_data(analysis) if analysis else None
    parts = {
        "title": _title(summary, analysis),
        "facts": _facts(summary, analysis),
        "summary": summary,
        "columns": table.columns(summary) if summary else [],
        "table": table.rows(summary) if summary else [],
        "overview": overview(analysis),
        "choosers": any(chart.choice and len(chart.choice.options) > 1 for chart in charts),
        "explorer_name": EXPLORER if explorer else None,
        "about": _about(summary, analysis),
    }
    return laid_out("page.html", charts, parts, plotly, {"explorer": explorer})


def laid_out(
    name: str,
    charts: Sequence[Chart],
    parts: dict[str, Any],
    plotly: str | None,
    data: dict[str, Any] | None = None,
) -> str:
    """A page's HTML: its charts by section, and what else its template shows.

    Args:
        name: of the template.
        plotly: see `render`.
        data: for the page's scripts, beside the charts.
    """
    sections = {
        section: [c for c in charts if c.section == section] for section in (c.section for c in charts)
    }
    verdict = sections.pop(VERDICT, [])
    drawn = {chart.id: _packed(chart.for_page(), ("data", "choice")) for chart in charts}
    return template(name).render(
        **parts,
        verdict_charts=verdict,
        sections=list(sections.items()),
        data=json_for_script({"charts": drawn, **_packed(data or {}, ("explorer",))}),
        plotly_file=PLOTLY,
        # Markup is for our own and our dependencies' files, never for input.
        plotly_source=Markup(plotly) if plotly else None,  # nosec B704
    )


def _packed(parts: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The parts that the page's script unpacks when it needs them, packed; the others as they are."""
    return {name: pack(part, PACKED_FROM) if name in names else part for name, part in parts.items()}


def template(name: str) -> jinja2.Template:
    """One of the report's templates, with everything from outside escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rmoe.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = lambda name: name.lower().replace(" ", "-")
    environment.globals["asset"] = lambda name: Markup(  # nosec B704
        (files("rmoe.report") / "assets" / name).read_text(encoding="utf-8")
    )
    return environment.get_template(name)


def all_charts(summary: Summary | None, analysis: Analysis | None) -> list[Chart]:
    """Every chart of the report, with one look per router throughout.

    Colours follow the routers' names, not the rank that a run gave them.
    """
    names = sorted({r.router for r in summary.routers}) if summary else []
    analysed = [model.name for model in analysis.models] if analysis else []
    looks = styles(dict.fromkeys([*names, *analysed]), summary.baseline if summary else None)
    charts = comparison_charts(summary, looks) if summary else []
    return charts + (routing_charts(analysis, looks) if analysis else [])


def json_for_script(data: object) -> Markup:
    """JSON that cannot end the script element it stands in, nor open a comment or another script.

    >>> print(json_for_script("</script>"))
    "\\u003c/script>"
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))  # nosec B704


def _title(summary: Summary | None, analysis: Analysis | None) -> str:
    if summary is None:
        return "Routing of " + ", ".join(model.name for model in (analysis.models if analysis else []))
    others = [router.router for router in summary.routers if router.router != summary.baseline]
    if not 1 <= len(others) <= 3:
        return f"{len(summary.routers)} routers compared"
    return f"{' and '.join(filter(None, (', '.join(others[:-1]), others[-1])))} against {summary.baseline}"


Facts = Sequence[tuple[str, str]]


def _facts(summary: Summary | None, analysis: Analysis | None) -> Facts:
    if summary:
        return [
            ("text", summary.corpus.name),
            ("preset", summary.preset),
            ("seeds", str(max(router.finished for router in summary.routers))),
            ("unit", f"{UNITS[summary.corpus.unit]}, lower is better"),
        ]
    if not analysis:
        return []
    facts = [("text", analysis.text.name), ("tokens", f"{analysis.text.tokens:,}")]
    many = len(analysis.models) > 1
    for model in analysis.models:
        name = f"check of {model.name}" if many else "check"
        facts.append((name, model.check.summary if model.check else "not made"))
    return facts


def _about(summary: Summary | None, analysis: Analysis | None) -> Facts:
    lines: list[tuple[str, str]] = []
    if summary:
        hardware, versions = summary.hardware, summary.versions
        libraries = ", ".join(f"{name} {version}" for name, version in versions.libraries.items())
        machine = f"{hardware.accelerator or hardware.cpu}, {hardware.cores} cores"
        lines = [
            (
                "Computed on",
                f"{machine}, {hardware.memory_gib:.0f} GiB; {counted([hardware.threads], 'thread')} a run",
            ),
            ("Code", f"rmoe {versions.code}, Python {versions.python}, {libraries}"),
            ("Text", f"{summary.corpus.name}, sha256 {summary.corpus.sha256}"),
            (
                "Statistics",
                "Paired t intervals over seeds; equivalence by two one-sided t tests (TOST); p values "
                "corrected over routers by Holm's step-down; seeds needed from the power of the paired t "
                "test.",
            ),
        ]
    if analysis:
        lines.append(("Routing measured on", f"{analysis.text.name}, {analysis.text.tokens:,} tokens"))
        lines += [("Note", note) for note in analysis.notes]
    return lines
