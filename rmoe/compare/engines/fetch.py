"""Results without a shared disk: a run is trained in a folder of its machine, which then travels with the answer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec

from rmoe.errors import RequestError
from rmoe.records import Record, atomic_write


class Fetched(Record, frozen=True, kw_only=True):
    """A job with a `folder`, carried out in a scratch folder; gives its value and the folder's files.

    Attributes:
        job: of which only `folder` is changed.
        processes: that it runs as; all have the one scratch folder.
        what: `result` leaves out the model and the checkpoints, `model` the checkpoints alone.
    """

    job: Any
    what: Literal["result", "model"]
    processes: int = 1

    def carry_out(self) -> tuple[Any, dict[str, bytes]]:
        """(value, path in the folder -> bytes)."""
        from rmoe.compare.engines.torchrun import Spread

        with tempfile.TemporaryDirectory(prefix="rmoe-run-") as scratch:
            folder = Path(scratch, "run")
            job = msgspec.structs.replace(self.job, folder=str(folder))
            value = (job if self.processes == 1 else Spread(job=job, processes=self.processes)).carry_out()
            skipped = ("checkpoints", "staging", *(() if self.what == "model" else ("model",)))
            files = {
                str(path.relative_to(folder)): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file() and path.relative_to(folder).parts[0] not in skipped
            }
        return value, files


def unpack(files: dict[str, bytes], folder: Path) -> None:
    """Write a fetched folder here; `result.json` last, so that a run with one is whole.

    Raises:
        RequestError: a path leads out of the folder.
    """
    for name in sorted(files, key=lambda name: name == "result.json"):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RequestError("engine.fetch", name, "a file of the run's own folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as staged:
            staged.write_bytes(files[name])
