"""The page in headless Chromium, network off: its numbers are the files' numbers, and everything can be used."""

from __future__ import annotations

import csv
import html
import io
import math

import pytest

from rmoe.records import read_record, write_record
from rmoe.report.page import all_charts, write_report
from rmoe.report.table import columns
from rmoe.results.analysis import read_analysis, write_analysis
from rmoe.results.comparison import SUMMARY_VERSION, Summary
from tests.report.browser import chromium, ready, requests_made
from tests.report.sample import EXPERTS, HOSTILE, LAYERS, sample_analysis, sample_summary


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two JSON files as a comparison leaves them; the page is made from what is read back from them."""
    folder = tmp_path_factory.mktemp("compared")
    write_record(folder / "summary.json", sample_summary())
    write_analysis(folder / "analysis.json", sample_analysis())
    return folder


@pytest.fixture(scope="module")
def summary(files):
    return read_record(files / "summary.json", Summary, SUMMARY_VERSION)


@pytest.fixture(scope="module")
def analysis(files):
    return read_analysis(files / "analysis.json")


@pytest.fixture(scope="module")
def page(files, summary, analysis):
    """A browser that has the report open, and stays open for the module."""
    path = write_report(files / "report", summary, analysis)
    with chromium() as driver:
        driver.get(path.as_uri())
        ready(driver)
        yield driver


def drawn(page, chart: str, keys: str = "x,y,z,name,type") -> list[dict]:
    """What plotly holds of a chart, as the browser has it."""
    return page.execute_script(
        "const [id, keys] = arguments;"
        "return document.getElementById(id).data.map(t => Object.fromEntries(keys.split(',').map(k => [k, "
        "t[k] ?? null])))",
        f"chart-{chart}",
        keys,
    )


def by_name(traces: list[dict], **wanted) -> dict[str, dict]:
    return {t["name"]: t for t in traces if all(t.get(k) == v for k, v in wanted.items())}


def test_no_console_message_and_no_outside_address(page):
    assert page.get_log("browser") == []
    asked = requests_made(page)
    assert any(url.endswith("/report/index.html") for url in asked)
    assert all(url.startswith(("file://", "data:", "blob:")) for url in asked), asked


def test_no_hostile_text_ran(page):
    assert page.execute_script("return window.hacked") is None
    assert page.execute_script("return document.images.length") == 0
    shown = page.execute_script("return document.querySelector('.notes').textContent")
    assert HOSTILE in shown


def test_the_verdict_and_table_are_the_summarys(page, summary):
    verdict = page.execute_script("return document.getElementById('verdict-text').textContent")
    assert verdict == summary.verdict
    cells = page.execute_script(
        "return [...document.querySelectorAll('#results tbody tr')].map(r => [...r.children].map(c => "
        "c.dataset.value ?? null))"
    )
    assert len(cells) == len(summary.routers) == 3
    titles = [column.title for column in columns(summary)]
    for row, router in zip(cells, summary.routers, strict=True):
        shown = {
            title: None if cell is None else float(cell)
            for title, cell in zip(titles, row, strict=True)
            if title not in ("router", "verdict")
        }
        difference = router.difference
        assert shown["validation"] == router.val.mean
        assert shown["test"] == router.test.mean
        assert shown[f"difference to {summary.baseline}"] == (difference.mean if difference else None)
        assert shown["initial logit std"] == router.initial_logit_std
        assert shown["parameters (router)"] == router.parameters.non_embedding
        assert shown["peak memory"] == router.timing.peak_mib
        assert shown["time"] == router.timing.seconds_per_1k_steps


def test_comparison_charts_hold_the_summarys_numbers(page, summary):
    lines = by_name(drawn(page, "curve-val", "x,y,name,showlegend"), showlegend=None)
    gaps = by_name(drawn(page, "val-difference", "x,y,name,showlegend"), showlegend=None)
    forest = drawn(page, "differences", "x,y,error_x")
    for router in summary.routers:
        band = router.curves["val"]
        assert (lines[router.router]["x"], lines[router.router]["y"]) == (band.step, band.mean)
        if router.difference:
            assert gaps[router.router]["y"] == router.val_difference.mean
            seeds, mean = [t for t in forest if t["y"][0] == router.router]
            assert seeds["x"] == router.difference.values
            assert mean["x"] == [router.difference.mean]
            interval = router.difference.interval
            assert mean["x"][0] + mean["error_x"]["array"][0] == pytest.approx(interval.high)
            assert mean["x"][0] - mean["error_x"]["arrayminus"][0] == pytest.approx(interval.low)


def test_heat_maps_hold_the_analysis_numbers_on_one_scale(page, analysis):
    for chart, field in (("mi-digitised", "mi_digitised"), ("mi-chosen", "mi_chosen")):
        maps = by_name(drawn(page, chart, "z,name,coloraxis"))
        for model in analysis.models:
            values = getattr(model, field).values
            shown = maps[model.name]["z"]
            assert [[v for b, v in enumerate(row) if b != a] for a, row in enumerate(shown)] == [
                [v for b, v in enumerate(row) if b != a] for a, row in enumerate(values)
            ]
            assert maps[model.name]["coloraxis"] == "coloraxis"
        if field == "mi_digitised":
            chance = maps["smoe, by chance"]
            assert chance["z"][0][1] == analysis.models[0].mi_digitised.chance[0][1]
            assert chance["coloraxis"] == "coloraxis"
    frequency = by_name(drawn(page, "frequency", "z,name"))
    middle = (LAYERS - 2) // 2
    pairs = by_name(drawn(page, "coactivation", "z,name"))
    for model in analysis.models:
        assert frequency[model.name]["z"] == [[100 * v for v in row] for row in model.frequency]
        assert pairs[model.name]["z"] == [[100 * v for v in row] for row in model.coactivation.across[middle]]


def test_routing_lines_hold_the_analysis_numbers(page, analysis):
    for chart, field in (
        ("entropy-mean", "entropy_mean"),
        ("inner-balance", "inner_balance"),
        ("outer-balance", "outer_balance"),
        ("load-imbalance", "load_imbalance"),
    ):
        shown = drawn(page, chart)
        for trace, model in zip(shown, analysis.models, strict=True):
            assert trace["y"] == getattr(model, field).values
            assert trace["name"] == f"{model.name} ({getattr(model, field).overall:.3f})"
    lines = by_name(drawn(page, "drop-ratio"))
    similarity = by_name(drawn(page, "similarity"))
    norms, spreads = by_name(drawn(page, "router-norm")), by_name(drawn(page, "router-std"))
    stability = by_name(drawn(page, "saturation"))
    for model in analysis.models:
        assert lines[model.name]["y"] == model.drop_ratio.overall
        assert similarity[model.name]["y"] == model.similarity.values
        assert norms[model.name]["y"] == model.router_weights.norm
        assert spreads[model.name]["y"] == model.router_weights.std
        assert stability[model.name]["y"] == pytest.approx([sum(r) / LAYERS for r in model.saturation.values])
    assert similarity["random initialisation"]["y"] == analysis.models[0].similarity.random_init


def test_entropy_curves_are_the_histograms_and_enclose_one(page, analysis):
    traces = drawn(page, "entropy", "x,y,name,xaxis")
    assert len(traces) == LAYERS * len(analysis.models)
    edges = analysis.models[0].entropy.edges
    for trace in traces:
        layer = int(trace["xaxis"][1:] or 1) - 1
        model = next(m for m in analysis.models if m.name == trace["name"])
        width = edges[1] - edges[0]
        assert sum(trace["y"]) * width == pytest.approx(1.0)
        assert [round(y * width * model.entropy.n) for y in trace["y"]] == model.entropy.counts[layer]


def test_gradient_split_is_over_training(page, analysis):
    traces = by_name(drawn(page, "gradient-split"))
    assert len(traces) == 3 * len(analysis.models)
    for model in analysis.models:
        split = model.gradient_split
        for said, values in (
            ("language model", split.language_model),
            ("balance loss", split.balance),
            ("recurrent path", split.recurrent),
        ):
            expected = [math.sqrt(sum(v * v for v in row)) for row in values]
            assert traces[f"{model.name}, {said}"]["y"] == pytest.approx(expected)


def test_every_chart_has_definition_unit_sample_and_csv(page):
    figures = page.execute_script(
        "return Promise.all([...document.querySelectorAll('figure')].map(async f => [f.querySelector('figcaption "
        "p').textContent,"
        " f.querySelector('.meta').textContent, await csv(f.querySelector('[data-csv]').dataset.csv),"
        " f.querySelector('.main-svg') !== null]))"
    )
    assert len(figures) >= 20
    for definition, meta, text, has_drawing in figures:
        assert len(definition) > 20
        assert "Unit: " in meta
        assert "n: " in meta
        assert text.count("\n") >= 2
        assert has_drawing


def test_a_charts_csv_has_all_that_is_drawn(page, summary, analysis):
    """Every number at full precision under its trace's name, for every option; as many cells in every row."""
    for chart in all_charts(summary, analysis):
        head, *rows = csv_of(page, chart.id)
        assert rows, chart.id
        assert {len(row) for row in rows} == {len(head)}, chart.id
        names, at = [], len(head) - (3 if "low" in head else 1)
        values: list[float | None] = []
        for option in range(len(chart.choice.options) if chart.choice else 1):
            for index, trace in enumerate(chart.data):
                if "fill" in trace:  # the columns low and high of the next trace
                    continue
                if chart.choice:
                    trace = {**trace, chart.choice.key: chart.choice.values[index][option]}
                found = [v for row in trace["z"] for v in row] if "z" in trace else trace["y"]
                values += found
                name = trace.get("meta", trace.get("name"))
                names += [html.unescape(name)] * len(found) if name else []
        assert [number(row[at]) for row in rows] == [v if v is not None else "" for v in values], chart.id
        assert [row[head.index("name")] for row in rows] == names if names else "name" not in head
        if chart.choice:
            assert list(dict.fromkeys(row[0] for row in rows)) == chart.choice.options


def test_a_csv_has_bands_bars_and_places(page, summary, analysis):
    head, *rows = csv_of(page, "curve-val")
    assert head == ["name", "optimizer step", "bits per byte", "low", "high"]
    for router in summary.routers:
        band = router.curves["val"]
        mine = [tuple(map(float, row[1:])) for row in rows if row[0] == router.router]
        assert mine == list(zip(band.step, band.mean, band.low, band.high, strict=True))
    head, *rows = csv_of(page, "differences")
    seeds = [(row[0], row[1], float(row[2])) for row in rows if row[1]]
    wanted = [
        (r.router, f"seed {seed}", value)
        for r in summary.routers
        if r.difference
        for seed, value in zip(r.difference.seeds, r.difference.values, strict=True)
    ]
    assert sorted(seeds) == sorted(wanted)
    for row in (row for row in rows if not row[1]):
        interval = next(r.difference.interval for r in summary.routers if r.router == row[0])
        assert [float(cell) for cell in row[-2:]] == pytest.approx([interval.low, interval.high])
    head, *rows = csv_of(page, "frequency")
    assert head == ["name", "row (layer)", "expert", "%"]
    found = {(name, int(layer), int(expert)): float(value) for name, layer, expert, value in rows}
    assert found == {
        (model.name, layer, expert): 100 * share
        for model in analysis.models
        for layer, shares in enumerate(model.frequency)
        for expert, share in enumerate(shares)
    }
    head, *rows = csv_of(page, "entropy")
    assert head[:3] == ["panel", "name", "nats"]
    assert {row[0] for row in rows} == {f"layer {layer}" for layer in range(LAYERS)}
    for chart in ("entropy-mean", "inner-balance"):  # their legends have a number behind the name
        assert {row[0] for row in csv_of(page, chart)[1:]} == {model.name for model in analysis.models}
    for chart in (
        id for id in page.execute_script("return Object.keys(report.charts)") if id.startswith("layers-")
    ):
        assert csv_of(page, chart)[0][:2] == ["row", "optimizer step"]  # its rows have no title


def test_a_csv_of_what_is_not_there(page):
    page.execute_script(
        "report.charts.odd = {layout: {}, data: [{x: [0, 1], y: [2, null], error_y: {array: [0.5, 0]}}]};"
        "report.charts.none = {layout: {}, data: []}"
    )
    assert csv_of(page, "odd") == [["x", "y", "low", "high"], ["0", "2", "1.5", "2.5"], ["1", "", "", ""]]
    page.execute_script(
        "report.charts.odd.data[0].y = [2, 3]; report.charts.odd.data[0].error_y.array = [0.5, null]"
    )
    assert csv_of(page, "odd") == [["x", "y", "low", "high"], ["0", "2", "1.5", "2.5"], ["1", "3", "", ""]]
    assert csv_of(page, "none") == [[]]
    page.execute_script("delete report.charts.odd; delete report.charts.none")


def test_a_csv_is_inert_in_a_spreadsheet(page):
    page.execute_script(
        "report.charts.odd = {layout: {}, data: [{name: '=1+1', x: ['@a', 'a &lt;b&gt; \"c\", d'], y: [-1.5, null]}]}"
    )
    assert csv_of(page, "odd") == [
        ["name", "x", "y"],
        ["'=1+1", "'@a", "-1.5"],
        ["'=1+1", 'a <b> "c", d', ""],
    ]
    page.execute_script("delete report.charts.odd")


def csv_of(page, chart: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(page.execute_script("return csv(arguments[0])", chart))))


def number(cell: str) -> float | str:
    """A number, or what is none: a name on an axis, nothing."""
    try:
        return float(cell)
    except ValueError:
        return cell


def test_charts_can_be_saved_as_svg(page):
    url = page.execute_async_script(
        "save('inner-balance', 'svg').then(arguments[0], e => arguments[0](String(e)))"
    )
    assert url.startswith("data:image/svg+xml")
    assert "layer" in url
    assert page.get_log("browser") == []


def test_token_explorer_by_mouse(page, analysis):
    first, second = analysis.models[:2]
    token = 7
    page.execute_script(f"document.querySelector('[data-token=\"{token}\"]').click()")
    said = page.execute_script("return [...document.querySelectorAll('.said')].map(s => s.textContent)")
    for text, model in zip(said, (first, second), strict=True):
        path = " → ".join(" + ".join(map(str, layer)) for layer in model.tokens[token].experts)
        assert text.endswith(f"(token {token}) goes to {path}")
    layer, expert = 2, first.tokens[token].experts[2][0]
    page.execute_script(
        f'document.querySelector(\'.side g[data-layer="{layer}"][data-expert="{expert}"]\')'
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    marked = page.execute_script(
        "return [...document.querySelectorAll('.tok.hit')].map(t => Number(t.dataset.token))"
    )
    assert marked == [i for i, t in enumerate(first.tokens) if expert in t.experts[layer]]
    rows = page.execute_script(
        "return [...document.querySelectorAll('.detail tbody tr')].map(r => [...r.children].map(c => "
        "c.textContent))"
    )
    top = first.top_tokens[layer][expert]
    assert [row[1] for row in rows] == [str(t.count) for t in top]
    assert rows[0][0] == HOSTILE.replace(" ", "␣")
    assert rows[0][2] == f"{100 * top[0].share:.1f}%"
    weight = first.tokens[token].weights[layer][0]
    node = f".side g[data-layer='{layer}'][data-expert='{expert}']"
    title = page.execute_script(
        "return document.querySelector(arguments[0]).getAttribute('aria-label')", node
    )
    assert title == f"layer {layer}, expert {expert}, weight {weight:.3f}"


def test_token_explorer_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    focus = "return document.activeElement"
    page.execute_script("document.querySelector('[data-token=\"0\"]').click()")
    stops = page.execute_script("return document.querySelectorAll('#tokens [tabindex=\"0\"]').length")
    assert stops == 1  # one tab stop, arrows within
    page.execute_script(focus).send_keys(Keys.ARROW_RIGHT)
    page.execute_script(focus).send_keys(Keys.ARROW_RIGHT)
    assert page.execute_script("return document.activeElement.dataset.token") == "2"
    page.execute_script(focus).send_keys(Keys.END)
    last = page.execute_script(
        "return [document.activeElement.dataset.token, document.activeElement.textContent]"
    )
    assert last[1] == "é"
    page.execute_script("document.querySelector('.side g[tabindex=\"0\"]').focus()")
    before = page.execute_script("return {...document.activeElement.dataset}")
    moved = Keys.ARROW_DOWN if int(before["expert"]) + 1 < EXPERTS else Keys.ARROW_UP
    page.execute_script(focus).send_keys(moved)
    page.execute_script(focus).send_keys(Keys.ENTER)
    after = page.execute_script("return {...document.activeElement.dataset}")
    assert abs(int(after["expert"]) - int(before["expert"])) == 1
    caption = page.execute_script("return document.querySelector('.detail caption').textContent")
    assert f"layer {after['layer']}, expert {after['expert']}:" in caption


def test_choosing_another_model_changes_that_side_only(page, analysis):
    page.execute_script("document.querySelector('[data-token=\"3\"]').click()")
    page.execute_script(
        "const s = document.querySelectorAll('.side select')[1]; s.value = 2; s.dispatchEvent(new "
        "Event('change'))"
    )
    said = page.execute_script("return [...document.querySelectorAll('.said')].map(s => s.textContent)")
    assert "(token 3)" in said[1]
    token = analysis.models[2].tokens[3]
    assert said[1].endswith(" → ".join(" + ".join(map(str, layer)) for layer in token.experts))


def test_theme_follows_the_system_and_the_button(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(background)
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = page.execute_script(background)
    assert dark != light
    page.execute_script("document.getElementById('theme').click()")
    assert page.execute_script(background) == light
    ready(page)
    assert page.get_log("browser") == []


def test_one_model_alone_and_a_single_file(tmp_path, analysis):
    alone = type(analysis)(text=analysis.text, models=analysis.models[:1])
    path = write_report(tmp_path, None, alone, single_file=True)
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    with chromium() as driver:
        driver.get(path.as_uri())
        ready(driver)
        assert driver.get_log("browser") == []
        assert driver.execute_script("return document.querySelectorAll('.side').length") == 1
        assert driver.execute_script("return document.querySelectorAll('.main-svg').length") > 10
