"""docs/seams.md from the test results.

`python -m tests.seams.table` runs every job, the slow ones too, keeps the results in runs/seams.xml and writes the
page. `--results a.xml b.xml` takes results that `pytest tests/seams --junitxml` wrote before: a later file's cells
replace an earlier one's, but a skipped cell replaces nothing.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

from tests.seams.exceptions import EXCEPTIONS
from tests.seams.families import CONTROL, FAMILIES
from tests.seams.jobs import GROUPS, JOBS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "seams.md"
RESULTS = ROOT / "runs" / "seams.xml"
COMMON = Path(__file__).with_name("common.md")
PASSES, SKIPPED, CONTROL_FAILS, FAILS = "passes", "skipped", "control fails", "fails"
TITLES = {
    "olmoe": "OLMoE (control)",
    "rmoe": "RMoE",
    "graft-olmoe": "graft on OLMoE",
    "graft-qwen3moe": "graft on Qwen3-MoE",
}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "torchao", "onnx", "onnxruntime")

HEAD = """# Seams: where other people's programs meet these models

{counts}

Does an RMoE model, or a grafted one, do what a transformers model does? Each row is a job that people, or programs
such as Trainer, PEFT and TRL, give to a model. Each column is a tiny model; transformers' OLMoE is the control.

- **passes**: the job ran and its result is right. What right means is in the job's code, in `tests/seams/`.
- **control fails**: the job fails here, and for transformers' own OLMoE too.
- **fails**: the job fails here and not for OLMoE. The number leads to the reason.
- **skipped**: a package that the job needs was not installed.

`python -m tests.seams.table` runs all jobs and writes this page. `make test` runs the quick jobs, `make test-all` the
slow ones too (marked *slow*). A cell that is listed as failing and passes fails its test.
{versions}
"""


def read_results(paths: list[Path]) -> dict[tuple[str, str], str]:
    """(job, model) -> passed, failed or skipped, a known exception counting as failed; later files win."""
    found: dict[tuple[str, str], str] = {}
    names = "|".join(FAMILIES)
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            cell = re.fullmatch(rf"test_job\[(\w+)-({names})\]", case.get("name", ""))
            if cell is None:
                continue
            skipped = case.find("skipped")
            broken = case.find("failure") is not None or case.find("error") is not None
            if skipped is not None and skipped.get("type") == "pytest.skip":
                found.setdefault((cell[1], cell[2]), "skipped")
                continue
            expected = (cell[1], cell[2]) in EXCEPTIONS and skipped is not None
            found[cell[1], cell[2]] = "unexpected" if broken else "failed" if expected else "passed"
    return found


def cell_text(job: str, model: str, result: str, notes: dict[str, int]) -> str:
    """One cell of the page, its reason's number looked up in `notes` (and entered there)."""
    if result == "passed":
        return PASSES
    if result == "skipped":
        return SKIPPED
    number = notes.setdefault(EXCEPTIONS[job, model], len(notes) + 1)
    return f"{CONTROL_FAILS if (job, CONTROL) in EXCEPTIONS else FAILS} [{number}](#reasons)"


def render(results: dict[tuple[str, str], str], versions: str) -> str:
    """The page."""
    notes: dict[str, int] = {}
    body: list[str] = []
    for group in GROUPS:
        body += ["", f"## {group}", "", f"| job | {' | '.join(TITLES.values())} |", "|---|---|---|---|---|"]
        for job in JOBS.values():
            if job.group == group:
                cells = (cell_text(job.name, model, results[job.name, model], notes) for model in TITLES)
                body.append(f"| {job.title}{' *(slow)*' if job.slow else ''} | {' | '.join(cells)} |")
    reasons = [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()]
    return "\n".join(
        [
            HEAD.format(counts=count(results), versions=versions),
            *body[1:],
            "",
            "## Reasons",
            "",
            *reasons,
            "",
            COMMON.read_text(encoding="utf-8"),
        ]
    )


def count(results: dict[tuple[str, str], str]) -> str:
    """The finding, in one sentence."""
    ours = {cell: result for cell, result in results.items() if cell[1] != CONTROL}
    passed = sum(result == "passed" for result in ours.values())
    with_control = sum(
        result == "failed" and (job, CONTROL) in EXCEPTIONS for (job, _), result in ours.items()
    )
    alone = sum(result == "failed" for result in ours.values()) - with_control
    skipped = sum(result == "skipped" for result in ours.values())
    left = f", {skipped} were skipped" if skipped else ""
    return (
        f"Of {len(JOBS)} jobs on three models of ours, {passed} cells pass, {with_control} fail together with the "
        f"control, {alone} fail alone{left}."
    )


def installed() -> str:
    """What the results were measured with."""
    said = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            said.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Measured with {', '.join(said)}."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args()
    files = arguments.results
    if files is None:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        files = [RESULTS]
        command = [sys.executable, "-m", "pytest", "tests/seams/test_seams.py", "-m", "", "-n", "0"]
        subprocess.run([*command, "--junitxml", str(RESULTS)], cwd=ROOT, check=False)
    results = read_results(files)
    cells = [(job, model) for job in JOBS for model in FAMILIES]
    if lacking := [cell for cell in cells if cell not in results]:
        print(f"error: no result for {len(lacking)} cells, among them {lacking[0]}", file=sys.stderr)
        return 1
    if wrong := [cell for cell in cells if results[cell] == "unexpected"]:
        print("\n".join(f"error: {job}, {model}: see its test" for job, model in wrong), file=sys.stderr)
        return 1
    arguments.out.write_text(render({cell: results[cell] for cell in cells}, installed()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
