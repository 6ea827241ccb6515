"""The model card: the `README.md` beside a model's weights, which the Hugging Face Hub shows.

One layout for every model that this package writes. Who writes a model gives the contents; the front matter is
huggingface_hub's own, so that the Hub can read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load

from rmoe.errors import one_line

CARD = "README.md"
MARK = "<!-- Written by rmoe. -->"
UNKNOWN = "unknown"  # the Hub's identifier where no licence is stated


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured value. `unit` is the metric's identifier too: `bits_per_byte`, `accuracy`."""

    split: str
    unit: str
    value: float


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says.

    Attributes:
        title: the model's name.
        summary: what it is, in a sentence.
        data: the name of the text or the task file, as its user gave it; empty for a model that was not trained.
        metrics: what was measured, on what.
        context: what each token was predicted from, in words; empty where the metric is none of language modelling.
        tables: heading -> rows, in order.
        load: Python lines that load the model from `folder`.
        task: the Hub's pipeline tag.
        base: folder or Hub id of the model it was made from.
        license: identifier of the weights' licence; what the base states, else `unknown`.
    """

    title: str
    summary: str
    data: str = ""
    metrics: tuple[Metric, ...] = ()
    context: str = ""
    tables: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    load: str
    task: str = "text-generation"
    base: str | None = None
    license: str = UNKNOWN

    def front_matter(self) -> str:
        """The YAML that the Hub reads: licence, library, tags, data, base model, results."""
        results = [
            EvalResult(
                task_type=self.task,
                dataset_type="text",
                dataset_name=one_line(self.data),
                dataset_split=metric.split,
                metric_type=metric.unit,
                metric_value=metric.value,
            )
            for metric in self.metrics
        ]
        dataset = self.data.removeprefix("hf:") if self.data.startswith("hf:") else None
        data = ModelCardData(
            model_name=one_line(self.title),
            license=self.license,
            library_name="transformers",
            pipeline_tag=self.task,
            tags=["rmoe", "mixture-of-experts", "arxiv:2408.06793"],
            datasets=[one_line(dataset)] if dataset else None,
            base_model=one_line(self.base) if self.base else None,
            eval_results=results or None,
        )
        return data.to_yaml()

    def markdown(self) -> str:
        """The whole card."""
        parts = [
            f"---\n{self.front_matter()}\n---",
            MARK,
            f"# {one_line(self.title)}",
            one_line(self.summary),
        ]
        if self.metrics:
            rows: dict[str, str] = {}
            for metric in self.metrics:
                said = f"{metric.value:.4f} {metric.unit.replace('_', ' ')}"
                rows[metric.split] = f"{rows[metric.split]}, {said}" if metric.split in rows else said
            context = f"\n\nEach token is predicted from {one_line(self.context)}." if self.context else ""
            parts.append("## Metrics\n\n" + _table(rows) + context)
        parts.append(f"## Load it\n\n```python\n{self.load}\n```")
        parts += [f"## {heading}\n\n{_table(rows)}" for heading, rows in self.tables.items()]
        parts.append(f"## Licence\n\n{self._licence()}")
        return "\n\n".join(parts) + "\n"

    def _licence(self) -> str:
        if self.license == UNKNOWN:
            return (
                "Not stated. Set `license` in the front matter before you publish the weights: the data and the base "
                "model decide it, not the licence of the program that trained them."
            )
        return f"`{self.license}`, as the base model states."


def _table(rows: Mapping[str, object]) -> str:
    def cell(value: object) -> str:
        return one_line(str(value)).replace("|", "\\|")

    return "\n".join(
        ["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows.items())]
    )


def write_card(folder: Path, card: ModelCard) -> None:
    """Write a model's card into its folder."""
    (folder / CARD).write_text(card.markdown(), encoding="utf-8")


def is_own(path: Path) -> bool:
    """Whether a file is a card that this package wrote, for another model than the one it would be copied to."""
    return path.name == CARD and MARK in path.read_text(encoding="utf-8", errors="replace")


def stated_license(folder: Path) -> str:
    """The licence that a model folder's card states, `unknown` without one that can be read."""
    try:
        metadata = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return UNKNOWN
    stated = metadata.get("license")
    return one_line(stated) if isinstance(stated, str) and stated else UNKNOWN
