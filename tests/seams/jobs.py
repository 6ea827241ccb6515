"""All jobs in one table, in the order of docs/seams.md."""

from __future__ import annotations

from importlib import import_module

from tests.seams.job import JOBS, Job

for _part in ("trainer", "losses", "generation", "adapters", "objects"):
    import_module(f"tests.seams.{_part}")  # enters its jobs

GROUPS = ("Trainer", "Forward and loss", "Generation", "PEFT", "TRL", "Copies and conversions", "Files and loading",
          "Devices and processes", "Pipelines")  # fmt: skip
"""The sections of the page, in order: a part that imports another enters the other's jobs first."""

__all__ = ["GROUPS", "JOBS", "Job"]
