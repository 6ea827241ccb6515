"""The card that a finished run leaves beside its weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rmoe.routing.describe import equation
from rmoe.routing.spec import RouterSpec
from rmoe.training.run import read_result, train
from tests.training import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    train(tiny.config(tiny.text(folder), max_steps=2, warmup_steps=1), folder / "run", progress=False)
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


def test_the_cards_lines_load_the_model(run: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (run / "model" / "README.md").read_text(), re.DOTALL)
    names = {"folder": run / "model"}
    exec(code, names)
    model, tokenizer = names["model"], names["tokenizer"]
    logits = model(**tokenizer("a = 1", return_tensors="pt")).logits
    assert logits.shape == (1, 5, model.config.vocab_size)
