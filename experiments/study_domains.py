"""Finished models on texts they were never trained on: `domains.json` beside each run's result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
from transformers import AutoModelForCausalLM

import rmoe.model  # noqa: F401  registers the model's classes
from rmoe.data import prepare
from rmoe.data.config import DataConfig
from rmoe.training.evaluation import evaluate
from rmoe.training.run_folder import read_result

FILE = "domains.json"
BLOCKS = 400


def evaluate_domains(folder: Path, domains: Mapping[str, str], data_dir: Path) -> dict[str, float]:
    """Bits per byte on the first `BLOCKS` blocks of each text; what is there already is read.

    Args:
        folder: of a finished run.
        domains: name -> file in `data_dir`.
    """
    if (folder / FILE).exists():
        return read_domains(folder)
    length = int(read_result(folder).config["training"]["sequence_length"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=False)
    found = {}
    for name, file in domains.items():
        corpus = prepare(DataConfig(path=str(data_dir / file), split="whole", max_bytes=4_000_000), length)
        found[name] = corpus.in_unit("test", evaluate(model, corpus.test, limit=BLOCKS).loss)
    (folder / FILE).write_bytes(msgspec.json.encode(found) + b"\n")
    print(f"{folder.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()), flush=True)
    return found


def read_domains(folder: Path) -> dict[str, float]:
    """What `evaluate_domains` found; empty where it has not run."""
    path = folder / FILE
    return msgspec.json.decode(path.read_bytes(), type=dict[str, float]) if path.exists() else {}
