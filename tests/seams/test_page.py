"""docs/seams.md says what the table of jobs and the list of exceptions say."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.seams.exceptions import EXCEPTIONS
from tests.seams.families import CONTROL, FAMILIES
from tests.seams.jobs import GROUPS, JOBS
from tests.seams.table import CONTROL_FAILS, FAILS, PAGE, PASSES, SKIPPED, TITLES

MEASURED_WITH = f"torch {torch.__version__}, transformers {transformers.__version__},"


@pytest.mark.skipif(
    MEASURED_WITH not in PAGE.read_text(encoding="utf-8"),
    reason="the page is of another transformers, or another build of torch, where other cells fail",
)
def test_the_page_has_every_job_and_every_exception() -> None:
    assert list(TITLES) == list(FAMILIES)
    page = PAGE.read_text(encoding="utf-8")
    rows = {}
    for line in page.splitlines():
        title, *cells = line.strip("| ").split(" | ")
        if len(cells) == len(TITLES) and title != "job":
            rows[title.removesuffix(" *(slow)*")] = cells
    assert list(rows) == [job.title for group in GROUPS for job in JOBS.values() if job.group == group]
    assert len(rows) == len(JOBS)
    for job in JOBS.values():
        for model, cell in zip(TITLES, rows[job.title], strict=True):
            said = cell.split(" [")[0]
            if (job.name, model) in EXCEPTIONS:
                allowed = {CONTROL_FAILS if (job.name, CONTROL) in EXCEPTIONS else FAILS}
            else:
                allowed = {PASSES}
            assert said in allowed | ({SKIPPED} if job.needs else set()), f"{job.name}, {model}: {said}"
    for reason in EXCEPTIONS.values():
        assert f"{reason[0].upper()}{reason[1:]}." in page
