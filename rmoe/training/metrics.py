"""`metrics.jsonl`: one JSON object per line, appended as training goes. Imports no torch.

Rows have `kind` and `step` (optimizer steps done) and then, for `"kind": "train"`, means over the steps since
the row before:

    loss             training loss, nats per token: lm_loss + balance_loss
    lm_loss          cross-entropy, nats per token
    balance_loss     the weighted balance losses, as added
    bits_per_byte    or `perplexity`: lm_loss in the corpus's unit
    gate_entropy     [L] mean entropy of the gate's probabilities, nats
    logit_std        [L] standard deviation of the raw logits over experts, root mean square over tokens
    load_imbalance   [L] assignments of the busiest expert over the mean; 1 is perfect balance
    dropped          share of assignments dropped at capacity
    router_grad_norm, grad_norm   before clipping, of the last step
    lr               of the last step
    tokens           training tokens so far, without padding
    tokens_per_s     over training steps alone
    peak_mib         peak memory so far

and for `"kind": "eval"`: `split`, `loss` (nats per token), the figure in the corpus's unit, `tokens`
(evaluated), `context`. A `"kind": "skipped"` row says which step was left out and why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from rmoe.records import NOT_JSON, atomic_write, sync, write_whole

Row = dict[str, Any]


class MetricsLog:
    """Appends rows to a file, each by one write, so that a kill costs at most the last line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Row) -> None:
        """Add a row. NaN and infinity are written as null: JSON has neither."""
        line = msgspec.json.encode(row) + b"\n"
        with self.path.open("ab", buffering=0) as file:
            write_whole(file, line)

    def sync(self) -> None:
        """Force the rows to disk."""
        if self.path.exists():
            sync(self.path)

    def truncate(self, step: int) -> None:
        """Keep the rows up to a step: those after it are about to be measured again."""
        if not self.path.exists():
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        with atomic_write(self.path) as staged:
            staged.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in kept))


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`; a last line cut by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = msgspec.json.decode(line, type=Row)
        except NOT_JSON:
            continue
        if isinstance(row.get("step"), int):
            rows.append(row)
    return rows
