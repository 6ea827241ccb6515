"""Cells of the table that are known to fail, each with its reason. Strict: one that passes fails its test."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version

from tests.seams.families import CONTROL, FAMILIES, olmoe_classifier_known
from tests.versions import older

TRANSFORMERS = Version(transformers.__version__)
ALL = tuple(FAMILIES)
FAMILY_CODE = (CONTROL, "graft-olmoe", "graft-qwen3moe")
"""Models whose code is transformers' own; a graft adds nothing to it."""

_DROPPED = "Trainer reads a checkpoint without transformers' weight conversion and drops the experts"
_OLD_NAME = (
    "PEFT hands the cache on by the name it had before transformers 5.24, so generation loses the prompt"
)

_KNOWN: list[tuple[str, tuple[str, ...], str]] = [
    # ---- Trainer ----
    ("best_model_at_end", FAMILY_CODE, _DROPPED),
    ("resumes", FAMILY_CODE, _DROPPED),
    (
        "accumulated_balance_loss",
        FAMILY_CODE,
        "the family adds its balance loss to each micro-batch undivided",
    ),
    # ---- forward ----
    ("tuples_by_configuration", FAMILY_CODE, "the family's forward reads its trunk's output by name"),
    ("unknown_keyword", FAMILY_CODE, "the family's forward takes any keyword"),
    ("no_rows", ALL, "attention reshapes by -1, which is ambiguous without elements"),
    # ---- generation ----
    ("contrastive", ALL, "transformers fetches contrastive search from the Hub"),
    ("cache_offloaded", ALL, "an offloaded cache needs an accelerator"),
    ("cache_offloaded_static", ALL, "an offloaded cache needs an accelerator"),
    # ---- objects ----
    ("double_precision", FAMILY_CODE, "`grouped_mm`, transformers' default for experts, knows no float64"),
]
if older("accelerate", "1.15"):
    _KNOWN.append(("auto_device_map", ALL, "accelerate refuses a device map that is all disk"))

if Version("5.24") <= TRANSFORMERS:
    _KNOWN += [
        ("prompt_tuning", ALL, _OLD_NAME),
        ("prefix_generation", FAMILY_CODE, _OLD_NAME),
    ]
    if torch.version.cuda is None:
        _KNOWN.append(("checkpointing_offloaded", ALL, "a CPU build of torch pins no memory"))

if not olmoe_classifier_known():
    _KNOWN += [
        (name, (CONTROL, "graft-olmoe"), "transformers has no classifier for OLMoE and takes none")
        for name in ("auto_classes", "classifier_saved", "rmoe_load_classes", "text_classification")
    ]

EXCEPTIONS: dict[tuple[str, str], str] = {
    (job, model): reason for job, models, reason in _KNOWN for model in models
}
"""(job, model) -> why it fails."""
