"""Text classification: a head on a language model, and how well it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from rmoe.compat import model_classes
from rmoe.data.tasks import Labelled
from rmoe.errors import RequestError
from rmoe.model.loading import read_strictly
from rmoe.model.weights import open_weights
from rmoe.training.evaluation import Evaluation, inference

_HEADS = ("score.", "lm_head.")


def load_classifier(path: Path, labels: Sequence[int | str], pad: int, seed: int) -> PreTrainedModel:
    """A model folder's model with a head for these labels; the head starts random unless the folder has one.

    Raises:
        RequestError: as `rmoe.load`; or the folder has a head for other labels; or the family has no classifier; or any
            weight but a head's does not fit.
    """
    open_weights(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if AutoModelForSequenceClassification not in dict(model_classes(type(config))):
        raise RequestError("model", config.model_type, "a family with a sequence classifier in transformers")
    has_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    # By index: files of earlier versions have them as text sorts them, 10 before 2.
    its, given = [config.id2label[n] for n in sorted(config.id2label)], [str(label) for label in labels]
    unnamed = its == [f"LABEL_{index}" for index in range(len(given))]
    if has_head and its != given and not unnamed:
        allowed = f"those of the model's head, {', '.join(its)}; or a model without a head"
        raise RequestError("labels", ", ".join(given), allowed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = read_strictly(
            AutoModelForSequenceClassification,
            path,
            free=_HEADS,
            id2label=dict(enumerate(map(str, labels))),
            label2id={str(label): index for index, label in enumerate(labels)},
            pad_token_id=pad,
            dtype="auto",
        )
    return model


class LabelledTexts(Dataset[dict[str, Any]]):
    """Token ids and the label's index; `collate` pads a batch. `sizes` are the texts' tokens."""

    def __init__(
        self, items: Sequence[Labelled], labels: Sequence[int | str], tokenizer: Any, length: int, pad: int
    ) -> None:
        self.ids = tokenizer([item.text for item in items], truncation=True, max_length=length)["input_ids"]
        self.sizes = [len(ids) for ids in self.ids]
        index = {label: number for number, label in enumerate(labels)}
        tokenizer("")  # or it would keep, and save, the truncation
        self.labels = [index[item.label] for item in items]
        self.pad = pad

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}

    def collate(self, batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` `[B, longest]`, `labels` `[B]`; padding on the right."""
        rows = [torch.tensor(item["input_ids"], dtype=torch.int64) for item in batch]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": torch.tensor([item["labels"] for item in batch]),
        }


def label_set(items: Sequence[Labelled]) -> list[int | str]:
    """The labels of a training set, in order.

    Raises:
        RequestError: fewer than two, or two of one name, the number and the text.
    """
    labels = sorted({item.label for item in items}, key=lambda label: (isinstance(label, str), label))
    if len(labels) < 2:
        raise RequestError("--data", labels, "texts with at least two different labels")
    for label in labels:
        if not isinstance(label, str) and str(label) in labels:
            raise RequestError(
                "--data", f"labels {label} and '{label}'", "either, which a model gives one name"
            )
    return labels


def predict(model: nn.Module, texts: LabelledTexts, batch_size: int = 64) -> list[int]:
    """The label index the model gives each text."""
    return [label for logits, _ in _logits(model, texts, batch_size) for label in logits.argmax(-1).tolist()]


def label_loss(model: nn.Module, texts: LabelledTexts, batch_size: int = 64) -> Evaluation:
    """Mean loss over the labels."""
    nats = sum(
        cross_entropy(logits.float(), labels, reduction="sum").item()
        for logits, labels in _logits(model, texts, batch_size)
    )
    return Evaluation(nats, len(texts), "the text")


def _logits(model: nn.Module, texts: LabelledTexts, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`[B, labels]` and the labels `[B]`, batch by batch."""
    with inference(model) as device:
        for start in range(0, len(texts), batch_size):
            batch = texts.collate([texts[i] for i in range(start, min(start + batch_size, len(texts)))])
            labels = batch.pop("labels").to(device)
            yield model(**{name: part.to(device) for name, part in batch.items()}).logits, labels


def scores(predicted: Sequence[int], actual: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-averaged F1, and what always naming the commonest label would get.

    >>> scores([1, 1, 0, 1], [1, 0, 0, 1])["accuracy"]
    0.75
    """
    right = Counter(a for p, a in zip(predicted, actual, strict=True) if p == a)
    said, are = Counter(predicted), Counter(actual)
    f1 = [2 * right[label] / (said[label] + are[label]) for label in said.keys() | are.keys()]
    return {
        "accuracy": sum(right.values()) / len(actual),
        "f1_macro": sum(f1) / len(f1),
        "majority_accuracy": max(are.values()) / len(actual),
    }
