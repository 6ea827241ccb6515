"""The card that a finished run leaves beside its weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import ModelCard

from rmoe.cli.train import run as command
from rmoe.routing.describe import equation
from rmoe.routing.spec import RouterSpec
from rmoe.training.card import training_card
from rmoe.training.run import read_result, train
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    config = tiny.config(tiny.text(folder), max_steps=2, warmup_steps=1)
    config = replace(config, logging=replace(config.logging, test_blocks=3))
    train(config, folder / "run", progress=False)
    return folder / "run"


def test_the_front_matter_has_the_metrics_of_the_result(run: Path) -> None:
    data, result = ModelCard.load(run / "model" / "README.md").data, read_result(run)
    assert (data.license, data.pipeline_tag) == ("unknown", "text-generation")
    metrics = {entry.dataset_split: (entry.metric_type, entry.metric_value) for entry in data.eval_results}
    assert metrics == {"validation": ("bits_per_byte", result.val), "test": ("bits_per_byte", result.test)}


def test_the_card_names_router_data_and_sizes(run: Path) -> None:
    text, result = (run / "model" / "README.md").read_text(), read_result(run)
    for said in (
        equation(RouterSpec.from_dict(result.router_spec)),
        f"| text | {result.corpus.name} |",
        result.corpus.sha256,
        f"| test | {result.test:.4f} bits per byte |",
        f"| parameters | {result.parameters.total:,} |",
        "| experts | 4, 2 per token |",
        "Not stated.",
    ):
        assert said in text


def test_each_metric_states_its_part_of_its_split(run: Path) -> None:
    result = read_result(run)
    assert "the first 8 of" in result.context
    assert "the first 3 of" in result.test_context
    said = f"{result.context} (validation), and from {result.test_context} (test)."
    assert said in (run / "model" / "README.md").read_text()
    older = msgspec.structs.replace(result, test_context=None)
    assert training_card(older).context == result.context


def test_the_command_says_each_part(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rmoe.training.run.train", lambda *_, **__: read_result(run))
    command(out=run, config=tiny.config(run))
    pattern = (
        r"validation [\d.]+ \(the first 8 of \d+ blocks\), test [\d.]+ \(the first 3 of \d+ blocks\) bits"
    )
    assert re.search(pattern, capsys.readouterr().out)


def test_a_result_of_before_has_no_context_of_its_own_for_test(run: Path, tmp_path: Path) -> None:
    stored = json.loads((run / "result.json").read_bytes())
    del stored["test_context"]
    (tmp_path / "result.json").write_text(json.dumps(stored))
    older = read_result(tmp_path)
    assert (older.context, older.test_context) == (stored["context"], None)


def test_the_cards_lines_load_the_model(run: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (run / "model" / "README.md").read_text(), re.DOTALL)
    names = {"folder": run / "model"}
    exec(code, names)
    model, tokenizer = names["model"], names["tokenizer"]
    logits = model(**tokenizer("a = 1", return_tensors="pt")).logits
    assert logits.shape == (1, 5, model.config.vocab_size)
