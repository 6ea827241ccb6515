"""Labels of texts: learned, scored, and refused where the training set has them not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rmoe.cli.main import main
from rmoe.data.encode import byte_tokenizer
from rmoe.data.tasks import Labelled
from rmoe.errors import RequestError
from rmoe.finetune.classification import label_set, load_classifier, scores
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.run import finetune
from rmoe.graft import GraftSpec, graft_folder, undo_folder
from rmoe.model.weights import ADAPTER, digest, open_weights, read_json
from rmoe.routing.recurrence import Recurrence
from rmoe.training.metrics import read_metrics
from tests.finetune.conftest import write_lines


def texts(number: int, seed: int) -> list[dict[str, Any]]:
    """The label is whether the last letter is a vowel; two in three are."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        good = draw.random() < 2 / 3
        word = "".join(draw.choices("abcdefghij", k=draw.randint(3, 8)))
        rows.append(
            {"text": word + draw.choice("aeiou" if good else "bcdfg"), "label": "good" if good else "bad"}
        )
    return rows


@pytest.fixture(scope="module")
def grafted_qwen(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE, a family with a classifier in transformers: `base`, and its graft in both forms."""
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for form in ("grafted", "adapter"):
        spec = GraftSpec(recurrence=Recurrence.Config(width=8))
        graft_folder(folder / "base", folder / form, spec, full=form == "grafted")
    return folder


@pytest.mark.parametrize("name", ["rmoe", "grafted", "adapter"])
def test_it_beats_the_majority(name: str, models: Path, grafted_qwen: Path, tmp_path: Path) -> None:
    source = models / name if name == "rmoe" else grafted_qwen / name
    train = write_lines(tmp_path / "train.jsonl", texts(240, 0))
    valid = write_lines(tmp_path / "valid.jsonl", texts(120, 1))
    config = FinetuneConfig(
        task="classification",
        valid=valid,
        epochs=5.0,
        batch_size=8,
        learning_rate=5e-3,
        sequence_length=32,
        device="cpu",
        threads=1,
    )
    result = finetune(source, train, tmp_path / "out", config, progress=False)
    assert result.scores["accuracy"] > result.scores["majority_accuracy"] + 0.1
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    tokens = [row["tokens"] for row in rows if row["kind"] == "train"]
    assert tokens[-1] == 5 * sum(len(row["text"]) for row in texts(240, 0))  # bytes, five epochs
    assert read_json(Path(result.model) / "tokenizer.json")["truncation"] is None
    losses = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert len(losses) >= 10
    assert losses[-1] < losses[0]
    model = AutoModelForSequenceClassification.from_pretrained(result.model)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert any("router" in key for key in model.state_dict())
    # The head that it learned is in it, the one that it does not have is not asked of the base.
    if name == "adapter":
        saved = read_json(Path(result.model) / "config.json")["rmoe_graft"]["base"]
        assert "score.weight" in open_weights(Path(result.model)).names(ADAPTER)
        assert saved["unused"] == ["lm_head.weight"]
        undo_folder(Path(result.model), tmp_path / "classifier", keep_trained=True)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
        assert type(plain).__name__ == "Qwen3MoeForSequenceClassification"
        assert torch.equal(plain.score.weight, model.score.weight)
        assert undo_folder(Path(result.model), tmp_path / "original").verified is True


def test_scores_are_sklearns() -> None:
    draw = random.Random(0)
    actual = [draw.choice([0, 1, 1, 2, 4]) for _ in range(200)]
    predicted = [draw.choice([a, a, 0, 3]) for a in actual]
    found = scores(predicted, actual)
    assert found["accuracy"] == pytest.approx(accuracy_score(actual, predicted))
    assert found["f1_macro"] == pytest.approx(f1_score(actual, predicted, average="macro"))
    assert found["majority_accuracy"] == max(actual.count(label) for label in set(actual)) / 200


def test_a_label_outside_the_training_set(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_lines(tmp_path / "train.jsonl", texts(8, 0))
    valid = write_lines(tmp_path / "valid.jsonl", [*texts(3, 1), {"text": "x", "label": "ugly"}])
    argv = ["finetune", str(models / "rmoe"), "--task", "classification", "--data", str(train)]
    assert main([*argv, "--valid", str(valid), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "valid.jsonl line 4" in line
    assert "ugly" in line
    assert not (tmp_path / "out").exists()


def test_one_label_is_no_task() -> None:
    with pytest.raises(RequestError, match="two different labels"):
        label_set([Labelled(text="a", label=1), Labelled(text="b", label=1)])
    with pytest.raises(RequestError, match="labels 1 and '1'"):
        label_set([Labelled(text="a", label=1), Labelled(text="b", label="1"), Labelled(text="c", label=0)])
    assert label_set([Labelled(text="a", label=10), Labelled(text="b", label=9)]) == [9, 10]


def test_a_new_head_learns_beside_a_router_alone(grafted_qwen: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "train.jsonl", texts(24, 0))
    config = FinetuneConfig(
        task="classification", train="router", epochs=1.0, batch_size=8, sequence_length=32, device="cpu", threads=1
    )  # fmt: skip
    result = finetune(grafted_qwen / "grafted", data, tmp_path / "out", config, progress=False)
    new = load_classifier(grafted_qwen / "grafted", ["bad", "good"], 256, config.seed)
    tuned = AutoModelForSequenceClassification.from_pretrained(result.model)
    assert not torch.equal(tuned.score.weight, new.score.weight)
    same = [
        torch.equal(p, dict(new.named_parameters())[n])
        for n, p in tuned.named_parameters()
        if "self_attn" in n
    ]
    assert all(same)
    # The head is the task's: without it the base is what it was.
    assert undo_folder(Path(result.model), tmp_path / "back").verified is True
    before, after = (digest(open_weights(f).tensors()) for f in (grafted_qwen / "base", tmp_path / "back"))
    assert before == after
    assert undo_folder(Path(result.model), tmp_path / "kept", keep_trained=True).verified is False
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert torch.equal(kept.score.weight, tuned.score.weight)


def test_a_head_of_more_than_ten_labels_is_found_again(models: Path, tmp_path: Path) -> None:
    labels = [f"class {n}" for n in range(13)]
    model = load_classifier(models / "rmoe", labels, 256, 0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert list(config["id2label"]) == [str(n) for n in range(13)]
    assert torch.equal(load_classifier(tmp_path, labels, 256, 1).score.weight, model.score.weight)
    path.write_text(json.dumps(config, sort_keys=True))  # as earlier versions wrote it
    assert torch.equal(load_classifier(tmp_path, labels, 256, 1).score.weight, model.score.weight)


@pytest.mark.parametrize("labels", [["bad"], ["bad", "good", "so-so"], ["bad", "worse"]])
def test_a_head_for_other_labels_is_not_given_to_these(
    labels: list[str], models: Path, tmp_path: Path
) -> None:
    model = load_classifier(models / "rmoe", ["bad", "good"], 256, 0)
    model.save_pretrained(tmp_path / "head")
    again = load_classifier(tmp_path / "head", ["bad", "good"], 256, 1)
    assert torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(RequestError, match=r"labels is '.*'; allowed: those of the model's head, bad, good"):
        load_classifier(tmp_path / "head", labels, 256, 0)
