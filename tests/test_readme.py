"""What the pages tell a reader to type: README's Python runs and prints, and every `rmoe` line parses."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from rmoe.cli.arguments import parse
from rmoe.cli.main import VERBS
from rmoe.routing import ZOO

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page in these languages."""
    return re.findall(
        rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[str]:
    """The `rmoe` commands of a page, continued lines joined."""
    lines = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("rmoe ")]


@pytest.mark.parametrize("index", range(len(blocks(ROOT / "README.md", "python"))))
def test_readme_python_can_be_pasted_and_prints(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks(ROOT / "README.md", "python")[index], {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # `--resume` looks into the folder that --out names
    for line in commands(page):
        _, verb, *arguments = shlex.split(line, comments=True)
        assert verb in VERBS, line
        assert parse(import_module(f"rmoe.cli.{verb}").run, arguments, f"rmoe {verb}") is not None, line


def test_readme_names_every_verb_that_works_on_models() -> None:
    named = {shlex.split(line, comments=True)[1] for line in commands(ROOT / "README.md")}
    assert {"train", "probe", "compare", "analyze", "graft", "finetune", "eval", "generate", "zoo"} <= named


def test_the_decisions_about_the_published_code_are_rows_of_the_zoo() -> None:
    section = (
        (ROOT / "docs" / "official.md")
        .read_text()
        .partition("## What had to be decided")[2]
        .partition("\n## ")[0]
    )
    named = {
        name
        for line in section.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"`((?:r?s?moe|xmoe|hyper-moe)[a-z0-9.-]*)`", line.rsplit("|", 2)[1])
    }
    assert {"rmoe", "rmoe-p256", "smoe-topk-softmax", "xmoe-reference"} <= named
    assert named <= ZOO.keys()
