"""The jobs of a comparison: plain records that any engine carries out. Imports no torch."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmoe.errors import RunError
from rmoe.parallel import ParallelConfig
from rmoe.records import Record
from rmoe.training.config import RunConfig
from rmoe.training.listing import is_locked

SECONDS_TO_SAVE = 120.0  # that a process which was told to end may hold a run's folder


class Train(Record, frozen=True, kw_only=True):
    """Train one model, or resume it; gives its `RunResult`.

    Attributes:
        data_sha256: identity of the prepared text, as the comparison has it; every machine must come to the same.
        branch_of: folder of the longer run that it begins at; None begins at step 0.
    """

    config: dict[str, Any]
    folder: str
    data_sha256: str
    branch_of: str | None = None

    def carry_out(self) -> Any:
        from rmoe.training.run import train

        config, folder = RunConfig.from_dict(self.config), Path(self.folder)
        require_data(config, self.data_sha256)
        if int(os.environ.get("RANK", "0")) == 0:
            wait_until_free(folder)
        longer = None if self.branch_of is None else Path(self.branch_of)
        return train(config, folder, resume=True, progress=False, branch_of=longer)


class EvaluateTest(Record, frozen=True, kw_only=True):
    """Evaluate a finished model on the test split; gives a float in the corpus's unit."""

    config: dict[str, Any]
    folder: str

    def carry_out(self) -> Any:
        from rmoe.compare.evaluate import evaluate_test

        return evaluate_test(_whole(self.config), Path(self.folder))


class MeasureRouting(Record, frozen=True, kw_only=True):
    """Analyse the routing of a finished run; gives a `ModelAnalysis`."""

    config: dict[str, Any]
    folder: str
    name: str
    tokens: int

    def carry_out(self) -> Any:
        from rmoe.compare.evaluate import measure_routing

        return measure_routing(_whole(self.config), Path(self.folder), self.name, self.tokens)


def _whole(config: dict[str, Any]) -> RunConfig:
    """A run's configuration for one process that holds its finished model."""
    return replace(RunConfig.from_dict(config), parallel=ParallelConfig())


def require_data(config: RunConfig, sha256: str) -> None:
    """Check that this machine trains on the text that the comparison was set up with.

    Raises:
        RunError: its text, tokenizer or split is another one.
    """
    from rmoe.data.ingest import corpus_key

    found = corpus_key(config.data)
    if found != sha256:
        raise RunError(
            f"the text of {os.uname().nodename} is not the comparison's (sha256 {found[:12]}, not {sha256[:12]})",
            "every other run",
            "give every machine the same data.path, then run the same command again",
        )


def wait_until_free(folder: Path) -> None:
    """Let a process that was told to end, here or before a restart, save and give a run's folder back."""
    deadline = time.monotonic() + SECONDS_TO_SAVE
    while is_locked(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
