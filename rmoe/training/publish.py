"""What a finished run leaves: its model, in one step, and its curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from rmoe.errors import RunError
from rmoe.model.card import ModelCard, write_card
from rmoe.records import durable_rename
from rmoe.results.run import Curve, LayerCurve, Unit
from rmoe.training import run_folder
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.metrics import Row

LAYER_UNITS = {
    "gate_entropy": "nats",
    "logit_std": "standard deviation over experts",
    "load_imbalance": "times the mean load",
}
"""What is logged layer by layer."""


def publish_model(
    out: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    card: ModelCard,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Publish `model/` in one step: staged, synced, renamed.

    Args:
        card: what its README.md says.
        complete: adds to the staged folder before it is published.
    """
    staged, target = out / "staging" / run_folder.MODEL, out / run_folder.MODEL
    store = CheckpointStore(out, "")
    try:
        store.clear_staging()
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_card(staged, card)
        if complete is not None:
            complete(staged)
        if target.exists():  # killed after this was written and before the result was
            target.rename(out / "staging" / "replaced-model")
        durable_rename(staged, target)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"could not save {target}: {error}", store.saved(), "free disk space, then --resume"
        ) from error


def curves(rows: list[Row], unit: Unit) -> dict[str, Curve]:
    """The rows of `metrics.jsonl` as curves; of per-layer figures the mean over layers."""
    wanted = {
        "val": ("eval", unit, unit),
        "train_lm_loss": ("train", unit, unit),
        "aux_loss": ("train", "balance_loss", "nats per token"),
        **{name: ("train", name, unit) for name, unit in LAYER_UNITS.items()},
        "router_grad_norm": ("train", "router_grad_norm", "norm"),
        "lr": ("train", "lr", "learning rate"),
    }
    found = {}
    for name, (kind, field, said) in wanted.items():
        if points := _points(rows, kind, field):
            values = [sum(v) / len(v) if isinstance(v, list) else v for _, v in points]
            found[name] = Curve(unit=said, step=[step for step, _ in points], value=values)
    return found


def layer_curves(rows: list[Row]) -> dict[str, LayerCurve]:
    """Gate entropy, scale of the logits and load imbalance by layer, to five digits."""
    found = {}
    for name, unit in LAYER_UNITS.items():
        if points := _points(rows, "train", name):
            values = [[float(f"{value:.5g}") for value in layers] for _, layers in points]
            found[name] = LayerCurve(unit=unit, step=[step for step, _ in points], value=values)
    return found


def _points(rows: list[Row], kind: str, name: str) -> list[tuple[int, Any]]:
    return [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
