"""The probe report: what the page shows is what the summary says; the packaged cards and the docs' table agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from experiments import cards as card_maker
from rmoe.cli.main import main
from rmoe.compare.probes import summarise
from rmoe.errors import RequestError
from rmoe.records import read_record, write_record
from rmoe.report.probes import cards as packaged_cards
from rmoe.report.probes import table
from rmoe.report.probes.charts import DRAWN
from rmoe.report.probes.page import finding, render, write_page
from rmoe.results.probes import MEAN, SUMMARY_VERSION, Knobs, ProbeRow, Reference, Summary
from tests.report.browser import chromium, ready, requests_made

HOSTILE = "<img src=x onerror=alert(1)>"
DOCS = Path(__file__).parents[2] / "docs" / "probes.md"


def invented(router: str, probe: str, seed: int, regret: float, state: bool, **changes: object) -> ProbeRow:
    layers = [regret, regret + 0.1]
    row = ProbeRow(
        router=router, router_spec={}, probe=probe, seed=seed, knobs=Knobs(layers=2), code="0", torch="0", stacked=4,
        seconds=2.0, parameters=1234, reference=Reference(blind=[0.9, 0.9], stateless=[0.5, 0.9], oracle=[0.1, 0.2]),
        loss=layers, regret=regret, regret_by_layer=layers, curve_step=[5, 10, 20], curve_regret=[1.0, 0.4, regret],
        steps_to_half=10, steps_to_tenth=None, accuracy=[0.9, 0.8], mutual_information=[1.0, 0.5], entropy=[0.5, 0.6],
        inner_balance=[2.0, 3.0], outer_balance=[0.9, 0.8], load=[1.1, 1.2], recurrent_share=0.3 if state else None,
        decodability=[0.9, 0.7] if state else None,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def rows() -> list[ProbeRow]:
    regrets = {"smoe": 0.8, "rmoe": 0.1, HOSTILE: 0.3}
    return [
        invented(name, probe, seed, regret + 0.01 * seed + 0.05 * (probe == "carry"), name != "smoe")
        for name, regret in regrets.items()
        for probe in ("lookup", "carry")
        for seed in range(3)
    ]


@pytest.fixture
def summary() -> Summary:
    return summarise(rows())


def test_summary_round_trips_and_refuses_another_version(summary: Summary, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_record(path, summary)
    assert read_record(path, Summary, SUMMARY_VERSION) == summary
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(RequestError, match="schema_version is 2"):
        read_record(path, Summary, SUMMARY_VERSION)


def test_tables(summary: Summary) -> None:
    shown = table.terminal(summary)
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["rmoe", "<img"]
    assert "0.110 ± 0.025" in shown
    markdown = table.markdown(summary)
    assert "<img" not in markdown
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 5


def test_a_sweep_says_which_value_is_shown() -> None:
    swept = [invented("a", "lookup", 0, v, True, knobs=Knobs(layers=2, noise=v)) for v in (0.5, 2.0)]
    found = summarise(swept, swept="noise")
    assert "All at noise 0.5, the first value swept" in table.caption(found)
    assert finding(found) == "a has the lowest regret on lookup at noise 0.5, 0.500."
    assert "at noise" not in table.caption(summarise(rows())) + finding(summarise(rows()))


def test_steps_are_medians_and_missing_when_half_never_come() -> None:
    mixed = [invented("a", "lookup", s, 0.1, True, steps_to_tenth=None if s else 20) for s in range(3)]
    (card,) = summarise(mixed).cards
    assert card.details["lookup"].steps_to_half == 10
    assert card.details["lookup"].steps_to_tenth is None


def test_page_is_escaped_and_complete(summary: Summary) -> None:
    html = render(summary)
    assert HOSTILE not in html
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', html).group(1))  # type: ignore[union-attr]
    charts = data["charts"]
    assert set(charts) == {"loss", "learning", "state", "accuracy", "entropy", "recurrent-share"}
    names = [trace["name"] for trace in charts["loss"]["data"]]
    assert {"blind", "stateless", "oracle"} < set(names)
    assert not any("<" in name for name in names)
    oracle = next(trace for trace in charts["loss"]["data"] if trace["name"] == "oracle")
    assert oracle["y"] == pytest.approx([0.1, 0.2])
    assert len([t for t in charts["state"]["data"] if t["name"] == "smoe"]) == 0
    assert html.count("<tr") == 4


def test_many_routers_are_in_the_table_and_few_in_the_figures() -> None:
    many = [
        invented(f"r{i}", "lookup", s, 0.01 * i + 0.001 * s, False)
        for i in range(DRAWN + 5)
        for s in range(2)
    ]
    html = render(summarise(many, "r16"))
    assert html.count('scope="row"') == DRAWN + 5
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', html).group(1))  # type: ignore[union-attr]
    names = {t["name"] for t in data["charts"]["learning"]["data"]}
    assert len(names) == DRAWN + 1
    assert "r16" in names  # the baseline, though it is last


def test_in_a_browser(summary: Summary, tmp_path: Path) -> None:
    """Drawn without the network, sorted by its headings, nothing hostile run."""
    path = write_page(tmp_path / "report", summary)
    with chromium() as driver:
        driver.get(path.as_uri())
        ready(driver)
        first = "return [...document.querySelectorAll('#results tbody th')].map(t => t.dataset.value)"
        assert driver.execute_script(first)[0] == "rmoe"
        button = driver.find_elements("css selector", "#results thead button")[1]
        button.click()
        button.click()
        assert driver.execute_script(first)[0] == "smoe"
        assert [a for a in requests_made(driver) if not a.startswith(("file:", "data:", "blob:"))] == []
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_cards_need_every_run_and_two_seeds() -> None:
    found = [
        invented(n, p, s, 0.2, True, knobs=Knobs()) for n in "ab" for p in ("lookup", "carry") for s in (0, 1)
    ]
    assert {row.router for row in card_maker.complete(found[:-1])} == {"a"}
    made = card_maker.cards_of(summarise(found))
    assert made.routers["a"].regret[MEAN].mean == 0.2
    assert "rank 1 of 2" in (packaged_cards.text(made, "a") or "")
    assert packaged_cards.text(made, "c") is None
    with pytest.raises(RequestError, match="2 or more seeds"):
        card_maker.cards_of(summarise([found[0], found[2]]))


def test_the_docs_table_is_the_packaged_one() -> None:
    carried = packaged_cards.packaged()
    if carried is None:
        pytest.skip("this package carries no probe results")
    text = DOCS.read_text(encoding="utf-8")
    assert card_maker.with_table(text, card_maker.markdown(carried)) == text


def test_zoo_prints_a_card(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [invented("rmoe", p, s, 0.2, True, knobs=Knobs()) for p in ("lookup", "carry") for s in (0, 1)]
    monkeypatch.setattr(packaged_cards, "packaged", lambda: card_maker.cards_of(summarise(found)))
    assert main(["zoo", "rmoe"]) == 0
    assert "0.200" in capsys.readouterr().out
    monkeypatch.setattr(packaged_cards, "packaged", lambda: None)
    assert main(["zoo", "rmoe"]) == 0
    assert "rmoe probe --routers rmoe" in capsys.readouterr().out
    assert main(["zoo", "nosuch"]) == 2
    assert main(["zoo", "rmoe", "--json"]) == 2
