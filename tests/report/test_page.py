"""The page and the table without a browser: what is written, what is escaped, what is left out."""

from __future__ import annotations

import math
import re

import msgspec
import plotly.graph_objects as go
import pytest

from rmoe.errors import RequestError
from rmoe.report import table
from rmoe.report.overview import overview
from rmoe.report.page import all_charts, json_for_script, render, write_report
from rmoe.results.analysis import Analysis, ModelAnalysis, read_analysis, write_analysis
from rmoe.results.comparison import SweepPoint
from rmoe.results.packed import pack
from tests.report.sample import HOSTILE, large_analysis, sample_analysis, sample_summary


def test_no_address_outside_and_no_hostile_markup():
    page = render(sample_summary(), sample_analysis())
    allowed = {"http://www.w3.org/2000/svg"}  # the namespace's name, never fetched
    assert set(re.findall(r"https?://[^\s\"'<>)]+", page)) <= allowed
    assert "//cdn" not in page
    assert "<script>window.hacked" not in page
    assert "<img" not in page
    assert page.count("</script>") == 6  # data, plotly, unpack, explorer, sort, page
    assert "&lt;/script&gt;" in page


def test_json_survives_the_script_element():
    text = json_for_script({"token": HOSTILE, "comment": "<!--"})
    assert "<" not in text
    assert msgspec.json.decode(text.encode()) == {"token": HOSTILE, "comment": "<!--"}


def test_plotly_accepts_every_figure():
    for chart in all_charts(sample_summary(), sample_analysis()):
        go.Figure({"data": chart.data, "layout": chart.layout})  # validates every key and value


def test_charts_appear_only_with_their_data():
    bare = ModelAnalysis(
        name="bare", summary="", layers=2, experts=4, experts_per_token=1, layer_names=["a", "b"]
    )
    text = sample_analysis().text
    assert all_charts(None, Analysis(text=text, models=[bare])) == []
    assert 'id="explorer"' not in render(None, Analysis(text=text, models=[bare]))
    mixed = Analysis(text=text, models=[bare, sample_analysis().models[0]])
    assert {t["name"] for c in all_charts(None, mixed) if c.id == "mi-chosen" for t in c.data} == {"smoe"}


@pytest.mark.parametrize(("least", "scale"), [(0.0, "linear"), (0.001, "log")])
def test_a_sweep_shows_the_value_0(least, scale):
    points = [SweepPoint(router="smoe", sweep={"aux": v}, n=1, val=1.0, chosen=False) for v in (least, 1.0)]
    summary = msgspec.structs.replace(sample_summary(), sweep_points=points)
    chart = next(c for c in all_charts(summary, None) if c.id == "sweep")
    assert chart.layout["xaxis"]["type"] == scale


def test_the_entropy_of_no_preference_is_that_of_all_classes():
    """A gate that may skip has a class beside the experts."""
    analysis = sample_analysis()
    first, *rest = analysis.models
    assert f"ln C = {math.log(first.experts):.2f}: no" in _definition(analysis, "entropy")
    edges = [edge * math.log(first.experts + 1) / math.log(first.experts) for edge in first.entropy.edges]
    skips = msgspec.structs.replace(first, entropy=msgspec.structs.replace(first.entropy, edges=edges))
    alone = msgspec.structs.replace(analysis, models=[skips])
    assert f"ln C = {math.log(first.experts + 1):.2f}: no" in _definition(alone, "entropy")
    mixed = _definition(msgspec.structs.replace(analysis, models=[skips, *rest]), "entropy")
    assert (
        f"ln C = {math.log(first.experts + 1):.2f} ({first.name}), {math.log(first.experts):.2f} (" in mixed
    )


def test_models_of_two_depths_show_every_pair_of_layers():
    """The first shown is one that both have; beyond its own the shallower has none."""
    deep, shallow = sample_analysis().models[:2]
    coactivation = msgspec.structs.replace(shallow.coactivation, across=shallow.coactivation.across[:1])
    pair = [deep, msgspec.structs.replace(shallow, coactivation=coactivation)]
    (chart,) = [
        c
        for c in all_charts(None, msgspec.structs.replace(sample_analysis(), models=pair))
        if c.id == "coactivation"
    ]
    assert chart.choice.start == 0
    assert len(chart.choice.options) == len(chart.choice.values[0]) == len(deep.coactivation.across) > 1
    assert len(chart.choice.values[1]) == 1


def test_one_expert_has_no_entropy_to_show():
    analysis = sample_analysis()
    first, *rest = analysis.models
    width0 = msgspec.structs.replace(first.entropy, edges=[0.0] * len(first.entropy.edges))
    alone = msgspec.structs.replace(first, experts=1, entropy=width0)
    both = msgspec.structs.replace(analysis, models=[alone, *rest])
    shown = {t["name"] for c in all_charts(None, both) if c.id == "entropy" for t in c.data}
    assert shown == {model.name for model in rest}
    only = msgspec.structs.replace(analysis, models=[alone])
    assert "entropy" not in {c.id for c in all_charts(None, only)}


def test_two_models_that_are_no_checkpoints_of_one_are_not_called_so():
    analysis = sample_analysis()
    first = next(model for model in analysis.models if model.saturation is not None)
    for steps, said in (
        ((0, 0), "has in common with"),
        ((400, 100), "has in common with"),
        ((100, 400), "from step 100 to step 400"),
    ):
        found = msgspec.structs.replace(
            first.saturation, from_step=[steps[0]], to_step=[steps[1]], values=first.saturation.values[:1]
        )
        alone = msgspec.structs.replace(first, saturation=found)
        text = _definition(msgspec.structs.replace(analysis, models=[alone]), "saturation")
        assert said in text
        assert ("checkpoint" in text) == (steps == (100, 400))


def _definition(analysis: Analysis, id: str) -> str:
    return next(c.definition for c in all_charts(None, analysis) if c.id == id)


def test_one_seed_has_no_interval_in_table_or_chart():
    summary = sample_summary(seeds=1)
    cells = table.rows(summary)
    assert all("[" not in cell.text for row in cells for cell in row)
    assert {row[5].text for row in cells} == {"baseline", "one seed: no verdict"}
    forest = next(c for c in all_charts(summary, None) if c.id == "differences")
    assert not any("error_x" in trace for trace in forest.data)


def test_markdown_table_has_table_1s_columns():
    text = table.markdown(sample_summary())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    for column in ("validation", "test", "parameters (router)", "peak memory (MiB)", "time (s per 1k steps)"):
        assert column in lines[0]
    assert "<script" not in text
    assert "88.0" in text  # the time measured alone


def test_time_and_memory_are_blank_when_no_run_was_timed_alone():
    summary = sample_summary()
    untimed = msgspec.structs.replace(
        summary, routers=[msgspec.structs.replace(r, timing=None) for r in summary.routers]
    )
    assert {cell.text for row in table.rows(untimed) for cell in row[-2:]} == {"–"}
    assert {row[9].text for row in table.rows(untimed)} == {"–"}


@pytest.mark.slow
def test_a_large_models_files_are_small(tmp_path):
    write_analysis(tmp_path / "analysis.json", large_analysis())
    analysis = read_analysis(tmp_path / "analysis.json")
    assert analysis == large_analysis()
    page = write_report(tmp_path / "report", None, analysis)
    assert (tmp_path / "analysis.json").stat().st_size < 5e6
    assert page.stat().st_size < 3e6


def test_version_1_is_read_and_damage_is_named(tmp_path):
    path = tmp_path / "analysis.json"
    tree = msgspec.to_builtins(sample_analysis())
    path.write_bytes(msgspec.json.encode(tree | {"schema_version": 1}))
    assert read_analysis(path) == sample_analysis()
    for change in (
        {"schema_version": 3},
        {"models": {"packed": "uint8", "n": 1, "bytes": "?"}},
        {"models": 1},
    ):
        path.write_bytes(msgspec.json.encode(tree | change))
        with pytest.raises(RequestError, match=r"schema_version|packed|models"):
            read_analysis(path)
    path.write_bytes(msgspec.json.encode({"schema_version": 2, **pack(list(range(100)), 8)}))
    with pytest.raises(RequestError, match=r"analysis\.json is .*written by rmoe"):
        read_analysis(path)


def test_the_overview_has_every_layer_and_statistic():
    analysis = sample_analysis()
    found = overview(analysis)
    titles = [column.title for column in found.columns]
    assert titles[:3] == ["layer", "model", "gate entropy"]
    assert "flips" in titles
    assert len(found.rows) == 3 * 6
    for row in found.rows:
        model = next(m for m in analysis.models if m.name == row.model)
        shown = dict(zip(titles[2:], row.cells, strict=True))
        assert shown["gate entropy"].value == model.entropy_mean.values[row.layer]
        assert shown["drop ratio"].value == model.drop_ratio.values[1][row.layer]
        assert shown["unused experts"].value == 0
        assert shown["stability"].value == model.saturation.values[-1][row.layer]
        assert all(0 <= cell.shade <= 1 for cell in row.cells)
    shades = [row.cells[0].shade for row in found.rows]
    assert min(shades) == 0
    assert max(shades) == 1


@pytest.mark.parametrize("single", [False, True])
def test_files_beside_the_page(tmp_path, single):
    write_report(tmp_path / "report", sample_summary(), None, single_file=single)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == ({"index.html"} if single else {"index.html", "plotly.min.js"})


def test_analysis_round_trip(tmp_path):
    write_analysis(tmp_path / "analysis.json", sample_analysis())
    assert read_analysis(tmp_path / "analysis.json") == sample_analysis()


def test_many_routers_get_distinct_looks():
    names = (*(f"r{i:02d}" for i in range(24)), "smoe")
    charts = all_charts(sample_summary(routers=names, seeds=1), None)
    lines = next(c for c in charts if c.id == "curve-val").data
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in lines}) == len(names)
    assert sum(t["visible"] is True for t in lines) == 8  # the rest wait in the legend
