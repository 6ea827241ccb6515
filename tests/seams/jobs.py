"""All jobs in one table, in the order of docs/seams.md."""

from __future__ import annotations

# Importing a module enters its jobs.
from tests.seams import adapters, generation, losses, objects, trainer  # noqa: F401 - in the order of the page
from tests.seams.job import JOBS, Job

__all__ = ["JOBS", "Job"]
