"""The card that fine-tuning leaves beside the weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.run import finetune
from rmoe.graft import undo_folder
from tests.finetune.conftest import write_lines

CARD = "README.md"


@pytest.mark.parametrize(
    ("task", "model", "trains"), [("instruction", "grafted", "router"), ("classification", "rmoe", "all")]
)
def test_the_card_of_each_task(
    task: str, model: str, trains: str, models: Path, alpaca: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(models / model, tmp_path / "base")
    (base / CARD).write_text("---\nlicense: mit\n---\n# base")
    labelled = [{"text": "a " * (1 + n % 3), "label": n % 2} for n in range(8)]
    data = alpaca if task == "instruction" else write_lines(tmp_path / "labelled.jsonl", labelled)
    config = FinetuneConfig(
        task=task,  # type: ignore[arg-type]
        valid=data,
        epochs=1.0,
        batch_size=8,
        sequence_length=512,
        train=trains,  # type: ignore[arg-type]
        device="cpu",
        threads=1,
    )
    result = finetune(base, data, tmp_path / "out", config, progress=False)
    card = ModelCard.load(Path(result.model) / CARD)
    assert (card.data.license, card.data.base_model) == ("mit", "base")
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results} == result.scores
    for name, value in result.scores.items():
        assert f"{value:.4f} {name.replace('_', ' ')}" in card.text
    assert f"| trained | {trains}, {result.trained_parameters:,} parameters |" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names = {"folder": result.model}
    exec(code, names)
    assert names["model"].num_parameters() > 0

    if task == "instruction":  # the card describes the tuned model: it is not the undone one's
        undo_folder(Path(result.model), tmp_path / "again")
        assert not (tmp_path / "again" / CARD).exists()
