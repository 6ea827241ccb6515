"""`rmoe zoo`: every named router, without importing torch."""

from __future__ import annotations

import json as jsonlib

from rmoe.routing.zoo import ZOO


def run(*, json: bool = False) -> None:
    """List every named router: its stages, where it comes from, what it carries from layer to layer.

    Args:
        json: print one JSON object, name -> {summary, source, spec}, instead of a table.
    """
    if json:
        rows = {
            name: {"summary": row.summary, "source": row.source, "spec": row.spec.to_dict()}
            for name, row in ZOO.items()
        }
        print(jsonlib.dumps(rows, indent=2))
        return
    name_width = max(map(len, ZOO))
    for name, row in ZOO.items():
        print(f"{name:<{name_width}}  {row.summary} [{row.source}]")
