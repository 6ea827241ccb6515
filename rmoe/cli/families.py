"""`rmoe families`: which MoE model types of transformers can be read and grafted."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any, TypeAlias

# Every MoE model type of one release of transformers, tried by tests/graft/tiny_families.py. Read as a file: importing
# `rmoe.moe` would import torch.
FAMILIES = Path(__file__).parents[1] / "moe" / "families.json"

Rows: TypeAlias = list[dict[str, Any]]


def run(*, json: bool = False) -> None:
    """List the MoE model types of transformers: can `rmoe analyze` read them, do they take a graft, and why not.

    Tried on tiny random models; a type whose own does not run is "not tried". Read, with every expert silenced once to
    see that exactly the tokens said to use it change; and grafted, with bit-identical outputs.

    Args:
        json: print JSON.
    """
    table = jsonlib.loads(FAMILIES.read_text(encoding="utf-8"))
    if json:
        print(jsonlib.dumps(table["families"], indent=2))
    else:
        print(
            f"Tried with transformers {table['transformers']}; the first {table['promised']} are promised.\n"
        )
        print(markdown_table(table["families"]), end="")


def markdown_table(rows: Rows) -> str:
    """The rows as docs/families.md has them, ending in a newline."""
    yes = {True: "yes", False: "no"}
    lines = ["| model type | read | graft | why not, or how far |", "|---|---|---|---|"]
    lines += [
        f"| `{row['model_type']}` | {yes[row['read']]} | {yes[row['graft']]} | {row['note'].replace('|', '/')} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
