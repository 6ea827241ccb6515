"""`rmoe zoo`: every named router, from the table that the package carries: no torch, and an answer at once.

`python -m experiments.zoo_page` makes the table, and docs/zoo.md from it; a test compares both with the code.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

import tyro

from rmoe.errors import RequestError

TABLE = Path(__file__).parents[1] / "routing" / "zoo.json"


def run(name: tyro.conf.Positional[str] = "", *, json: bool = False) -> None:
    """List every named router: its stages, where it comes from, what it carries from layer to layer.

    Args:
        name: of one router: prints its card, with what the probes measured of it.
        json: print one JSON object, name -> summary, source, stages, what it carries and needs, its cost at the paper's
            medium size, and its spec.
    """
    if name and json:
        raise RequestError("--json", True, "without a router's name")
    table = jsonlib.loads(TABLE.read_text(encoding="utf-8"))
    if name:
        print(_card(name, table))
    elif json:
        print(jsonlib.dumps(table["routers"], indent=2))
    else:
        width = max(map(len, table["routers"]))
        for name, row in table["routers"].items():
            carry = "" if row["carries"] == "-" else f"; carries {row['carries']}"
            print(
                f"{name:<{width}}  {row['summary']} [{row['source']}]\n{'':<{width}}  {_stages(row)}{carry}"
            )


def _card(name: str, table: dict[str, Any]) -> str:
    """What a router is and, where the package carries its probe results, what it can do."""
    if name not in table["routers"]:
        raise RequestError("router", name, f"one of {', '.join(table['routers'])}")
    row = table["routers"][name]
    facts = {"": f"{row['summary']} [{row['source']}]", "stages": _stages(row)}
    facts |= {label: row[label] for label in ("equation", "balance", "carries", "needs")}
    lines = [
        name,
        *(f"  {label:<9} {value}".rstrip() if label else f"  {value}" for label, value in facts.items()),
    ]

    from rmoe.report.probes import cards  # scipy: not for the list

    carried = cards.packaged()
    measured = cards.text(carried, name) if carried is not None else None
    return "\n".join([*lines, "", measured or f"no probe results: rmoe probe --routers {name} makes them"])


def _stages(row: dict[str, Any]) -> str:
    return " > ".join(row["stages"].values())
