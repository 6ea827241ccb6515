"""Links between the repository's own pages lead somewhere, headings included. `make docs` checks the site's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")])
LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]*)?\)")


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and mkdocs name them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {"#" + re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        there = page if not target else (page.parent / target).resolve()
        assert there.is_relative_to(ROOT), f"{target}: outside the repository"
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there), f"{target}{anchor}: no such heading"


def test_a_missing_heading_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n```\n# not one\n```\n[a](b.md#c) `[d](e)`")
    assert anchors(page) == {"#one-two-three"}
    assert LINK.findall(prose(page.read_text())) == [("b.md", "#c")]
