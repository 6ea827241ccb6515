"""The hook of mkdocs.yml: pages from outside docs/, the API reference, the navigation, links between all of them.

Guides link to each other as files of the repository, so that they work where the repository is read. Here each such
link becomes one between pages of the site; a link to a file that has no page stops the strict build.
The reference has one page for each module of a public package, read by mkdocstrings without importing anything.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# Public packages in the order of the reference. One that is not there is passed over; others are internal.
ROOMS = (
    "routing",
    "model",
    "moe",
    "graft",
    "analysis",
    "compare",
    "probes",
    "data",
    "training",
    "finetune",
    "evaluation",
    "planning",
    "results",
    "report",
)

# Pages of docs/ under their heading; one that is not named here is put last under "Guides".
GUIDES = ("add-a-router", "analysis", "graft", "scale", "zoo")
EVIDENCE = (
    "findings",
    "performance",
    "reliability",
    "probes",
    "seams",
    "mutants",
    "paper-map",
    "official",
    "log",
)

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


# --- pages -------------------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """Files of the repository that are pages -> where the page is in the site."""
    pages = {"README.md": "index.md", "experiments/README.md": "experiments/index.md"}
    pages |= {f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")}
    pages |= {"CITATION.cff": "citation.md", "LICENSE": "license.md"}
    for pattern in (
        "experiments/*.md",
        "experiments/*.toml",
        "experiments/results/**/*.md",
        "examples/*.py",
        "notebooks/*.ipynb",
    ):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            stem = (
                name if path.suffix == ".toml" else PurePosixPath(name).with_suffix("")
            )  # claims.md is there too
            pages.setdefault(name, f"{stem}.md")
    return pages


def content(name: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        return f"# {name}\n\n```python\n{text}```\n"
    if name.endswith(".toml"):
        return f"# {name}\n\n```toml\n{text}```\n"
    if name in ("CITATION.cff", "LICENSE"):
        return f"# {name}\n\n```text\n{text}```\n"
    if name.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(said if kind == "markdown" else f"```python\n{said}\n```" for kind, said in cells)
    return text


def modules(room: str) -> list[str]:
    """Dotted names of a package's public modules, the package itself first."""
    folder = ROOT / "rmoe" / room
    names = [path.relative_to(ROOT).with_suffix("").parts for path in sorted(folder.rglob("*.py"))]
    public = [parts for parts in names if not any(part.startswith("_") for part in parts)]
    return [f"rmoe.{room}", *(".".join(parts) for parts in public)]


def summary(module: str) -> str:
    """First line of a module's docstring."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].replace("\n", " ")


def short(module: str) -> str:
    """A module's name within its package."""
    return module.split(".", 2)[-1]


def described(module: str, *options: str) -> str:
    """What mkdocstrings reads: a module without a heading of its own."""
    lines = ["show_root_heading: false", "show_root_toc_entry: false", *options]
    return f"::: {module}\n    options:\n" + "".join(f"      {line}\n" for line in lines)


def reference(module: str) -> str:
    """The page of one module; of a package, the list of its modules."""
    own = modules(module.removeprefix("rmoe."))[1:] if module.count(".") == 1 else []
    if not own:
        return f"# {module}\n\n{described(module)}"
    table = "".join(f"| [`{name}`]({short(name)}.md) | {summary(name)} |\n" for name in own)
    return f"# {module}\n\n{described(module, 'members: false')}\n| module | |\n|---|---|\n{table}"


def rooms() -> list[str]:
    return [room for room in ROOMS if (ROOT / "rmoe" / room).is_dir()]


def api_pages() -> dict[str, str]:
    """Where in the site -> the module described there."""
    pages = {"api/index.md": "rmoe", "api/errors.md": "rmoe.errors"}
    for room in rooms():
        first, *others = modules(room)
        pages[f"api/{room}/index.md"] = first
        pages |= {f"api/{room}/{short(name)}.md": name for name in others}
    return pages


def api_index() -> str:
    """The first page of the reference: the packages, then what `import rmoe` itself gives."""
    packages = [(f"rmoe.{room}", f"{room}/index.md") for room in rooms()] + [("rmoe.errors", "errors.md")]
    table = "".join(f"| [`{name}`]({where}) | {summary(name)} |\n" for name, where in packages)
    return f"# API reference\n\n| package | |\n|---|---|\n{table}\n{described('rmoe')}"


# --- mkdocs' events ------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and those of the reference."""
    for name, where in sources().items():
        files.append(File.generated(config, where, content=content(name)))
    for where, module in api_pages().items():
        text = api_index() if module == "rmoe" else reference(module)
        files.append(File.generated(config, where, content=text))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation from what is there."""
    pages = sources()
    guides = {path.stem for path in (ROOT / "docs").glob("*.md")}
    api: list[Any] = ["api/index.md"]
    for room in rooms():
        first, *others = (where for where in api_pages() if where.startswith(f"api/{room}/"))
        api.append({f"rmoe.{room}": [first, *({Path(where).stem: where} for where in others)]})
    api.append({"rmoe.errors": "api/errors.md"})
    others = sorted(guides - {*GUIDES, *EVIDENCE})
    experiments = [where for where in pages.values() if where.startswith("experiments/")]
    nav: list[Any] = [
        {"Home": "index.md"},
        {"Guides": [f"{name}.md" for name in (*GUIDES, *others) if name in guides]},
        {"Examples": [where for where in pages.values() if where.startswith(("notebooks/", "examples/"))]},
        {"Evidence": [*(f"{name}.md" for name in EVIDENCE if name in guides), {"Experiments": experiments}]},
        {"API": api},
        {"Project": ["contributing.md", "security.md", "changelog.md", "citation.md", "license.md"]},
    ]
    config.nav = nav
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    places = sources()
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    origin = next((name for name, where in places.items() if where == here), f"docs/{here}")

    def between(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        name = os.path.normpath(PurePosixPath(origin).parent / target)
        where = places.get(name, name.removeprefix("docs/"))
        return f"{before}{os.path.relpath(where, PurePosixPath(here).parent)}{anchor or ''}{after}"

    parts = CODE.split(markdown)  # links inside code are not links
    return "".join(part if i % 2 else LINK.sub(between, part) for i, part in enumerate(parts))
