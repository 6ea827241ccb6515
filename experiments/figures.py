"""The figures of one finished run, a family at a time; each family is measured once and kept beside the runs."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

import rmoe
from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.token_text import TokenText
from rmoe.compare.evaluate import measure_routing
from rmoe.data import DataConfig, prepare
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.run import finetune
from rmoe.results.analysis import ModelAnalysis, PairMeasure
from rmoe.training.build import load_plugins
from rmoe.training.config import RunConfig
from rmoe.training.evaluation import evaluate
from rmoe.training.metrics import read_metrics
from rmoe.training.run_folder import read_result

Figures = dict[str, float]

ROUTING_TOKENS = 16_384
DOMAIN_BLOCKS = 200  # of the training's sequence length
GRADIENT_BLOCKS = 32
PHASES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the training
INSTRUCTIONS, HELD_OUT = 400, 100


@dataclass(frozen=True)
class Finished:
    """A finished run and where texts are. `domains`: name -> file in `data_dir`, "" for Python's own library."""

    folder: Path
    config: RunConfig
    data_dir: Path
    domains: dict[str, str]
    instructions: str


def figures_of(run: Finished, families: Iterable[str]) -> Figures:
    """Every figure of the families asked for."""
    load_plugins(run.config.plugin)
    found: Figures = {}
    for family in families:
        kept = run.folder / "figures" / f"{family}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(FAMILIES[family](run), indent=1), encoding="utf-8")
        found |= json.loads(kept.read_text(encoding="utf-8"))
    return found


def loss(run: Finished) -> Figures:
    """Bits per byte on validation and test text."""
    result = read_result(run.folder)
    assert result.val is not None
    assert result.test is not None
    return {"valid": result.val, "test": result.test}


def routing(run: Finished) -> Figures:
    """The finished model's routing of validation text, means over layers (pairs of layers: off the diagonal)."""
    found = measure_routing(run.config, run.folder, run.config.router, ROUTING_TOKENS)
    kept = run.folder / "figures" / "analysis.json"
    kept.write_bytes(msgspec.json.encode(found))
    return _routing(found)


def _routing(found: ModelAnalysis) -> Figures:
    figures: Figures = {}
    if found.mi_digitised is not None:
        figures["mi"] = _off_diagonal(found.mi_digitised)
        if found.mi_digitised.chance is not None:
            chance = PairMeasure(values=found.mi_digitised.chance, n=found.mi_digitised.n)
            figures["mi_over_chance"] = figures["mi"] - _off_diagonal(chance)
    if found.mi_chosen is not None:
        figures["mi_chosen"] = _off_diagonal(found.mi_chosen)
    for name in ("entropy_mean", "inner_balance", "outer_balance", "load_imbalance"):
        if (one := getattr(found, name)) is not None:
            figures[name.removesuffix("_mean")] = float(np.mean(one.values))
    if found.similarity is not None:
        figures["similarity"] = float(np.mean(found.similarity.values))
    if found.drop_ratio is not None:
        figures["dropped"] = found.drop_ratio.overall[found.drop_ratio.capacity_factor.index(1.0)]
    if (split := found.gradient_split) is not None and split.recurrent is not None:
        figures["recurrent_share"] = _norm(split.recurrent[0]) / _norm(split.language_model[0])
    return figures


def _off_diagonal(pairs: PairMeasure) -> float:
    values = np.array(pairs.values)
    return float(values[~np.eye(len(values), dtype=bool)].mean())


def _norm(layers: Iterable[float]) -> float:
    return math.sqrt(sum(x * x for x in layers))


def phases(run: Finished) -> Figures:
    """Gate entropy and load imbalance of the training batches around five points of the training, means over layers."""
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if row["kind"] == "train"]
    figures: Figures = {}
    for share in PHASES:
        row = min(rows, key=lambda row: abs(row["step"] - share * run.config.training.max_steps))
        for name in ("gate_entropy", "load_imbalance"):
            figures[f"{name}@{share:g}"] = float(np.mean(row[name]))
    return figures


def domains(run: Finished) -> Figures:
    """Bits per byte on texts of other kinds than the one trained on, and how much more that is than on its own kind."""
    model, own = rmoe.load(run.folder / "model"), loss(run)["test"]
    figures: Figures = {}
    for name, file in run.domains.items():
        path = str(run.data_dir / file) if file else None
        config = DataConfig(path=path, split="whole", max_bytes=4_000_000)
        corpus = prepare(config, run.config.training.sequence_length)
        figures[name] = corpus.in_unit("test", evaluate(model, corpus.test, limit=DOMAIN_BLOCKS).loss)
        figures[f"{name} over test"] = figures[name] - own
    return figures


def gradients(run: Finished) -> Figures:
    """The balance loss's share of the router's gradient, `|balance| / (|balance| + |LM|)`, at checkpoints kept."""
    length = run.config.training.sequence_length
    corpus = prepare(run.config.data, length)
    blocks = np.asarray(corpus.valid.tokens[: GRADIENT_BLOCKS * length]).reshape(-1, length)
    options = AnalysisOptions(gradient_tokens=blocks.size, explored_tokens=0)
    figures: Figures = {}
    for folder in sorted((run.folder / "checkpoints").glob("checkpoint-*")):
        share = int(folder.name.rpartition("-")[2]) / run.config.training.max_steps
        if share not in PHASES:
            continue
        subject = Subject(folder.name, rmoe.load(folder))
        (found,) = analyze_models([subject], blocks, TokenText(corpus.tokenizer), options)
        split = found.gradient_split
        assert split is not None
        assert split.balance is not None
        balance, language_model = _norm(split.balance[0]), _norm(split.language_model[0])
        figures[f"balance_share@{share:g}"] = balance / (balance + language_model)
    return figures


def frozen(run: Finished) -> Figures:
    """Held-out loss on answers, nats per byte, after learning from instructions with parts of the router frozen."""
    work = run.folder / "frozen"
    work.mkdir(exist_ok=True)
    with gzip.open(run.data_dir / run.instructions, "rt", encoding="utf-8") as lines:
        wanted = list(itertools.islice((line for line in lines if line.strip()), INSTRUCTIONS + HELD_OUT))
    learn, judge = work / "learn.jsonl", work / "judge.jsonl"
    learn.write_text("".join(wanted[:INSTRUCTIONS]), encoding="utf-8")
    judge.write_text("".join(wanted[INSTRUCTIONS:]), encoding="utf-8")
    figures: Figures = {}
    for freeze in ("none", "router", "router+cell"):
        settings = FinetuneConfig(
            valid=judge,
            freeze=freeze,  # type: ignore[arg-type]
            epochs=1,
            batch_size=8,
            learning_rate=1e-3,
            seed=run.config.training.seed,
            threads=run.config.training.threads,
        )
        out = work / freeze.replace("+", "-")
        scores = finetune(run.folder / "model", learn, out, settings, resume=out.exists()).scores
        figures[f"answers, frozen {freeze}"] = scores["answer_loss_nats"]
    return figures


FAMILIES: dict[str, Callable[[Finished], Figures]] = {
    "loss": loss,
    "routing": routing,
    "phases": phases,
    "domains": domains,
    "gradients": gradients,
    "frozen": frozen,
}
