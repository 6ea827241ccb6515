"""`make torture`'s figures as the table of docs/reliability.md: `python -m tests.torture.table runs/torture.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def kills(rows: Rows) -> str:
    (row,) = rows
    saving = f", {row['while_saving']} of them with something half saved"
    return f"{row['kills']} in {row['runs']} runs{saving} | {row['identical']} of {row['runs']} bit-identical"


def counted(outcome: str) -> Callable[[Rows], str]:
    return lambda rows: f"{len(rows)} | {outcome}"


def fuzzed(rows: Rows) -> str:
    (row,) = rows
    return (
        f"{row['tried']:,} in {row['seconds']:.0f} s | no traceback shown, no hang, nothing written elsewhere"
    )


def layout(rows: Rows) -> str:
    worst = max(row["gradient"] for row in rows)
    return f"{len(rows)} | worst gradient {worst:.1e}, loss {max(row['loss'] for row in rows):.1e}"


def losses(rows: Rows) -> str:
    return f"{len(rows)} | losses within {max(row['difference'] for row in rows):.1e}"


def endpoint(rows: Rows) -> str:
    (row,) = rows
    return f"{row['requests']} | {row['answered']} answered; p50 {row['p50']:.2f} s, p95 {row['p95']:.2f} s"


SAME_BITS = "seen and said; the checkpoint before used; same bits at the end"
TABLE: list[tuple[str, str, Callable[[Rows], str]]] = [
    ("kill -9: one process", "`kill -9` of one process at random moments", kills),
    ("kill -9: one process, while saving", "the same, while a checkpoint is being written", kills),
    ("kill -9: two ranks", "`kill -9` of two ranks (DDP), every other while saving", kills),
    (
        "kill -9: two ranks, FSDP2",
        "`kill -9` of two ranks (FSDP2, sharded checkpoints), the same",
        kills,
    ),
    ("damage: ", "kinds of damage to the newest checkpoint", counted(SAME_BITS)),
    (
        "disk full",
        "a full disk, at several levels",
        counted("last checkpoint whole, one line, exact afterwards"),
    ),
    ("malformed: ", "kinds of malformed input, 20 of each", counted("one line, nothing written elsewhere")),
    ("fuzzer", "the same, fuzzed", fuzzed),
    ("layout: ", "gradients of two ranks against one process", layout),
    ("losses: ", "`rmoe train` in other layouts and world sizes against one process", losses),
    ("endpoint", "requests to `rmoe serve`, 16 at once", endpoint),
]


def table(rows: Rows) -> str:
    """Markdown; what was not run is left out."""
    lines = ["| what | how often | outcome |", "|---|---|---|"]
    for prefix, said, phrase in TABLE:
        exact = not prefix.endswith((" ", "full", "fuzzer", "endpoint"))
        found = [r for r in rows if (r["kind"] == prefix if exact else r["kind"].startswith(prefix))]
        if found:
            lines.append(f"| {said} | {phrase(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
