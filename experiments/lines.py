"""Studies of one finished run per line, all of one code and one setting: their files, table and command."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from rmoe.errors import RequestError
from rmoe.records import Keyed, read_lines

R = TypeVar("R", bound=Keyed)


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Finished runs; none where there is no file. A line that a kill cut short is no finished run."""
    if not path.exists():
        return []
    return read_lines(path, lambda line, _: msgspec.json.decode(line, type=kind))[0]


def require_same(rows: Iterable[object], mine: Mapping[str, object], path: Path) -> None:
    """Refuse to add a run to those of another setting.

    Args:
        mine: the attributes that all rows share, with the values of the run to be added.

    Raises:
        RequestError: naming the attribute, this run's value and the value in `path`.
    """
    for row in rows:
        for name, value in mine.items():
            if value != (found := getattr(row, name)):
                raise RequestError(name, value, f"those of the runs in {path}: {found}")


def write_table(results: Path, table: str) -> None:
    """Write Markdown beside the file it was made from, and print it."""
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def command(module: str, about: str | None, out: Path, results: Path) -> argparse.ArgumentParser:
    """The command of a study that is `run`, and then has its `table`.

    Args:
        out: the default of `--out`.
        results: of `--results`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--results", type=Path, default=results)
    return parser
