"""The model card: the Hub reads its front matter, and its text cannot be broken by names from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubCard

from rmoe.model.card import CARD, Metric, ModelCard, is_own, stated_license, write_card


def card(**changes: object) -> ModelCard:
    values = {
        "title": "rmoe-quick",
        "summary": "A model.",
        "data": "text.txt",
        "metrics": (Metric(split="test", unit="bits_per_byte", value=1.25),),
        "load": "import rmoe",
    }
    return ModelCard(**(values | changes))  # type: ignore[arg-type]


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    write_card(tmp_path, card(data="hf:owner/name", base="owner/base", license="apache-2.0"))
    data = HubCard.load(tmp_path / CARD).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert (data.datasets, data.base_model) == (["owner/name"], "owner/base")
    assert "rmoe" in data.tags
    (result,) = data.eval_results
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("test", "bits_per_byte", 1.25)


def test_only_a_dataset_of_the_hub_is_named_as_one(tmp_path: Path) -> None:
    for data, named in (
        ("hf:owner/name", ["owner/name"]),
        ("text.txt", None),
        ("the standard library", None),
    ):
        write_card(tmp_path, card(data=data))
        assert HubCard.load(tmp_path / CARD).data.datasets == named


def test_a_licence_is_passed_on_and_never_made_up(tmp_path: Path) -> None:
    assert stated_license(tmp_path) == "unknown"
    write_card(tmp_path, card())
    assert stated_license(tmp_path) == "unknown"
    assert "Not stated" in (tmp_path / CARD).read_text()
    (tmp_path / CARD).write_text("---\nlicense: mit\n---\n# base")
    assert stated_license(tmp_path) == "mit"


@pytest.mark.parametrize(
    "text", ["---\nlicense: [a\n---\n", "---\n- a\n---\n", "", "---\nlicense: 3\n---\n", "\ufffd"]
)
def test_a_damaged_card_states_no_licence(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD).write_text(text)
    assert stated_license(tmp_path) == "unknown"


def test_names_from_outside_stay_in_their_place(tmp_path: Path) -> None:
    hostile = 'x\n---\nlicense: mit\n| a |\x1b[2J"'
    write_card(tmp_path, card(title=hostile, data=hostile, tables={"Data": {"text": hostile}}))
    assert HubCard.load(tmp_path / CARD).data.license == "unknown"
    text = (tmp_path / CARD).read_text()
    assert "\x1b" not in text
    row = next(line for line in text.splitlines() if line.startswith("| text |"))
    assert row.replace("\\|", "").count("|") == 3


def test_an_own_card_is_known_again(tmp_path: Path) -> None:
    write_card(tmp_path, card())
    assert is_own(tmp_path / CARD)
    (tmp_path / CARD).write_text("# The base's own")
    assert not is_own(tmp_path / CARD)
