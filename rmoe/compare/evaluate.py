"""A finished run evaluated: its model on the test split, and how it routes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, PreTrainedModel

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.token_text import TokenText
from rmoe.data import prepare
from rmoe.results.analysis import ModelAnalysis
from rmoe.training.build import load_plugins
from rmoe.training.config import RunConfig
from rmoe.training.evaluation import evaluate
from rmoe.training.place import Place, place_of, torch_settings
from rmoe.training.run_folder import MODEL, checkpoints_of


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

    Also how stable that is against the checkpoint before the last.
    """
    load_plugins(config.plugin)
    corpus = prepare(config.data, config.training.sequence_length)
    with torch_settings(config):
        place = place_of(config)
    ids = _blocks(corpus.valid.tokens, tokens, config.training.sequence_length)
    final = Subject(name, _load(folder / MODEL, place), config.training.max_steps)
    before = [(step, path) for step, path in checkpoints_of(folder) if step < config.training.max_steps]
    earlier = [Subject(f"{name} earlier", _load(path, place), step) for step, path in before[-1:]]
    return analyze_models(
        [final, *earlier], ids, TokenText(corpus.tokenizer), AnalysisOptions(), stability=bool(earlier)
    )[0]


def _blocks(text: np.ndarray, tokens: int, length: int) -> np.ndarray:
    """The first tokens as whole blocks [N, S] that share none, at least one."""
    count = max(1, min(len(text), tokens) // length)
    return np.asarray(text[: count * length]).reshape(count, length)
