"""The files around the code agree with it: citation, workflows, issue templates, the marker for type checkers."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

import rmoe

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def test_the_package_is_marked_as_typed() -> None:
    assert resources.files(rmoe).joinpath("py.typed").is_file()


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rmoe.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["url"].endswith("2408.06793")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_the_makefile_has(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for line in targets for name in line.split()}
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    wanted = [
        name
        for step in steps
        for word in re.findall(r"make (\S+)(?!\w)", step.get("run", ""))
        for name in ([word] if word != "${{" else jobs["versions"]["strategy"]["matrix"]["target"])
    ]
    assert wanted or any(".ci/run" in step.get("run", "") for step in steps)
    assert set(wanted) <= targets


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    for field in form["body"]:
        assert field["type"] in {"textarea", "input", "dropdown", "markdown", "checkboxes"}
        assert field["attributes"]["label"]
