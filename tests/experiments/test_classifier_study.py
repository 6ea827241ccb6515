"""The classifier study: pairs of finished models, a stopped study resumes, mixed settings are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest

from experiments import classifier_study
from experiments.classifier_study import BASELINE, ROUTER, SETTINGS, ClassifierRow, markdown
from experiments.lines import read_rows
from experiments.study import PLUGIN
from rmoe.errors import RequestError
from rmoe.results.run import Hardware, Versions
from rmoe.training.build import load_plugins
from rmoe.training.run import train
from tests.training import tiny

QUICK = replace(SETTINGS, epochs=1.0, batch_size=4, sequence_length=16)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Two trained models in `models`, and a task of eight sentences."""
    monkeypatch.setenv("RMOE_CACHE", str(tmp_path / "cache"))
    config = replace(tiny.config(tiny.text(tmp_path), max_steps=2), router_option=())
    load_plugins((PLUGIN,))
    for router in (BASELINE, ROUTER):
        named = config.with_setting("router", router)
        train(named, tmp_path / "models" / f"{router}-seed3", progress=False)
    (tmp_path / "tasks").mkdir()
    lines = [{"text": word, "label": index % 2} for index, word in enumerate(["bad", "good"] * 4)]
    for name in ("one", "two"):
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(text)
    monkeypatch.setattr(
        classifier_study,
        "files_of",
        lambda _, folder: (folder / "tasks" / "one.jsonl", folder / "tasks" / "two.jsonl"),
    )
    return tmp_path


def run(inputs, results, config=QUICK, seeds=(3,)):
    classifier_study.run(inputs, inputs / "models", inputs / "out", seeds, results, config, ("sst2",))
    return read_rows(results, ClassifierRow)


def test_a_pair_is_tuned_and_a_cut_line_is_run_again(inputs):
    results = inputs / "results.jsonl"
    rows = run(inputs, results)
    assert [row.key for row in rows] == [("sst2", BASELINE, 3), ("sst2", ROUTER, 3)]
    assert {row.pretraining_steps for row in rows} == {2}
    assert rows[0].pretraining_bits != rows[1].pretraining_bits
    assert all(row.settings["epochs"] == 1.0 for row in rows)
    assert not list((inputs / "out").iterdir())
    results.write_bytes(results.read_bytes()[:-40])
    assert len(read_rows(results, ClassifierRow)) == 1
    again = run(inputs, results)
    assert [(row.key, row.accuracy) for row in again] == [(row.key, row.accuracy) for row in rows]


def test_other_settings_and_missing_models_are_refused(inputs, capsys):
    results = inputs / "results.jsonl"
    run(inputs, results)
    with pytest.raises(RequestError, match="settings"):
        run(inputs, results, replace(QUICK, epochs=2.0))
    with pytest.raises(RequestError, match="smoe-seed4"):
        run(inputs, results, seeds=(4,))
    asked = ["run", "--models", str(inputs / "none"), "--out", str(inputs / "out")]
    assert classifier_study.main([*asked, "--results", str(inputs / "new.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bag_of_words_knows_separable_words(inputs):
    found = classifier_study.bag_of_words(*classifier_study.files_of("sst2", inputs))
    assert (found["accuracy"], found["majority_accuracy"]) == (1.0, 0.5)


def test_the_table_is_its_rows():
    def row(router: str, seed: int, accuracy: float) -> ClassifierRow:
        return ClassifierRow(
            task="sst2",
            router=router,
            seed=seed,
            accuracy=accuracy,
            f1_macro=0.5,
            pretraining_steps=2000,
            pretraining_bits=2.1,
            seconds=1.0,
            settings={"epochs": 2.0},
            versions=Versions(code="none", python="3", libraries={}),
            hardware=Hardware(cpu="none", cores=1, threads=1, memory_gib=1.0, accelerator=None),
        )

    rows = [row(BASELINE, seed, 0.70) for seed in range(4)]  # the fourth has no partner yet
    rows += [row(ROUTER, seed, accuracy) for seed, accuracy in enumerate((0.71, 0.72, 0.73))]
    words = {"sst2": {"accuracy": 0.8, "majority_accuracy": 0.5}}
    # differences 0.01, 0.02, 0.03: mean 0.02, half-width 4.303 x 0.01 / sqrt(3)
    line = "| sst2 | 3 | 0.7000 | 0.7200 | +0.0200 | -0.0048 to +0.0448 | 0.8000 | 0.5000 |"
    assert line in markdown(rows, words)
    with pytest.raises(RequestError, match="no runs"):
        markdown([], words)


def test_shared_attributes_are_compared_by_value(tmp_path):
    path = tmp_path / "rows.jsonl"
    versions = Versions(code="one", python="3", libraries={})
    classifier_study.require_same([], {"versions": versions}, path)
    other = msgspec.structs.replace(versions, code="two")
    with pytest.raises(RequestError, match="versions"):
        classifier_study.require_same([type("Row", (), {"versions": other})], {"versions": versions}, path)
