"""A finished run evaluated: its model on the test split, and how it routes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.snapshot import over_training
from rmoe.analysis.token_text import TokenText
from rmoe.data import prepare
from rmoe.results.analysis import ModelAnalysis, OverTraining
from rmoe.training.build import load_plugins
from rmoe.training.config import RunConfig
from rmoe.training.evaluation import evaluate
from rmoe.training.metrics import read_metrics
from rmoe.training.place import Place, place_of, torch_settings
from rmoe.training.run_folder import METRICS, MODEL, checkpoints_of


def _load(folder: Path, place: Place) -> PreTrainedModel:
    """A run's model, where the run computed it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    return model.to("cpu" if place.cpu else "cuda")  # type: ignore[arg-type]


def evaluate_test(config: RunConfig, folder: Path) -> float:
    """The finished model's loss on the whole test split, in the corpus's unit."""
    load_plugins(config.plugin)
    corpus = prepare(config.data, config.training.sequence_length)
    with torch_settings(config):
        place = place_of(config)
        model = _load(folder / MODEL, place)
        evaluation = evaluate(model, corpus.test, limit=config.test_blocks, bf16=place.bf16)
    return corpus.in_unit("test", evaluation.loss)


def measure_routing(config: RunConfig, folder: Path, name: str, tokens: int) -> ModelAnalysis:
    """How a finished run's model routes the first `tokens` tokens of the validation split.

    Also how stable that is against the checkpoint before the last, and what was recorded while it trained.
    """
    load_plugins(config.plugin)
    corpus = prepare(config.data, config.training.sequence_length)
    with torch_settings(config):
        place = place_of(config)
    ids = _blocks(corpus.valid.tokens, tokens, config.training.sequence_length)
    final = Subject(name, _load(folder / MODEL, place), config.training.max_steps)
    before = [(step, path) for step, path in checkpoints_of(folder) if step < config.training.max_steps]
    earlier = [Subject(f"{name} earlier", _load(path, place), step) for step, path in before[-1:]]
    analysis = analyze_models(
        [final, *earlier], ids, TokenText(corpus.tokenizer), AnalysisOptions(), stability=bool(earlier)
    )[0]
    return msgspec.structs.replace(analysis, over_training=_over_training(folder))


def _blocks(text: np.ndarray, tokens: int, length: int) -> np.ndarray:
    """The first tokens as whole blocks [N, S] that share none, at least one."""
    count = max(1, min(len(text), tokens) // length)
    return np.asarray(text[: count * length]).reshape(count, length)


def _over_training(folder: Path) -> list[OverTraining]:
    """The per-layer metrics of `metrics.jsonl`."""
    recorded = ("gate_entropy", "load_imbalance")
    rows = [row for row in read_metrics(folder / METRICS) if row["kind"] == "train"]
    rows = [
        row
        for row in rows
        if all(isinstance(row.get(name), list) and None not in row[name] for name in recorded)
    ]
    measures = over_training([row["step"] for row in rows], rows)
    return [
        msgspec.structs.replace(one, definition=one.definition.replace("held-out", "training"))
        for one in measures
    ]
