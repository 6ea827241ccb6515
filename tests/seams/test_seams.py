"""Every job with every model. A known exception is expected to fail, and fails the test when it passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from transformers.utils import logging

from tests.seams.exceptions import EXCEPTIONS
from tests.seams.families import FAMILIES
from tests.seams.jobs import JOBS, Job


def _installed(need: Requirement) -> bool:
    try:
        return need.specifier.contains(version(need.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _cells() -> Iterator[Any]:
    for job in JOBS.values():
        for family in FAMILIES.values():
            marks: list[Any] = [pytest.mark.slow] if job.slow else []
            missing = [need for need in job.needs if not _installed(Requirement(need))]
            if missing:
                marks.append(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
            elif reason := EXCEPTIONS.get((job.name, family.name)):
                marks.append(pytest.mark.xfail(strict=True, reason=reason))
            yield pytest.param(job, family.name, marks=marks, id=f"{job.name}-{family.name}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without what transformers says about tiny models, and without its progress bars."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize(("job", "name"), _cells())
def test_job(job: Job, name: str, tmp_path: Path) -> None:
    job.function(FAMILIES[name], tmp_path)


def test_every_exception_is_of_a_job_in_the_table() -> None:
    assert {job for job, _ in EXCEPTIONS} <= JOBS.keys()
    assert {name for _, name in EXCEPTIONS} <= FAMILIES.keys()


def test_the_table_is_as_large_as_promised() -> None:
    assert len(JOBS) >= 70
    assert len(FAMILIES) == 4
