"""A job that runs as several processes, started by `torchrun`.

The first rank's value is the answer, unless a rank fails: then the line of the one that failed first is. The others
only lose it.
"""

from __future__ import annotations

import os
import pickle  # nosec B403  what is read was written by the process that started this one
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from rmoe.compare.engines.engine import Answer, Failed, Job, Wants
from rmoe.compare.engines.fetch import Fetched
from rmoe.errors import RunError, Stopped
from rmoe.records import Record, atomic_write


def spread(job: Job, wants: Wants) -> Job:
    """The job as the processes it wants."""
    if wants.processes == 1:
        return job
    if isinstance(job, Fetched):  # one folder for all its ranks
        return msgspec.structs.replace(job, processes=wants.processes)
    return Spread(job=job, processes=wants.processes)


class Spread(Record, frozen=True, kw_only=True):
    """A job on several devices of one machine."""

    job: Any
    processes: int

    def carry_out(self) -> Any:
        """Start `torchrun`, and pass SIGTERM on to it, so that every rank saves."""
        with tempfile.TemporaryDirectory() as scratch:
            asked = Path(scratch, "job.pkl")
            asked.write_bytes(pickle.dumps(self.job))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(self.processes), "-m", __name__, str(asked)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self._wait(process)
            answer = _answer_in(Path(scratch))
            if answer is None:
                raise RunError(
                    f"torchrun ended with status {process.returncode}",
                    "checkpoints in the run's folder",
                    "run the same command again",
                )
        if answer.stopped:
            raise Stopped(answer.error)
        if answer.error is not None:
            raise Failed(answer.error)
        return answer.value

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> None:
        def pass_on(number: int, _frame: FrameType | None) -> None:
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _answer_in(folder: Path) -> Answer | None:
    """Of the rank that failed first, else of rank 0; None where neither has said anything."""
    found: dict[Path, Answer] = {
        path: pickle.loads(path.read_bytes())  # nosec B301
        for path in sorted(folder.glob("answer-*.pkl"), key=lambda path: path.stat().st_mtime_ns)
    }
    failed = (answer for answer in found.values() if answer.error is not None and not answer.stopped)
    return next(failed, found.get(folder / "answer-0.pkl"))


def main(asked: str) -> None:
    """One rank. One that fails ends with status 1, so that `torchrun` ends those that wait for it."""
    from rmoe.compare.engines.child import answer_to

    job, rank = Path(asked), os.environ["RANK"]
    answer = answer_to(pickle.loads(job.read_bytes()))  # nosec B301
    if rank == "0" or answer.error is not None:
        with atomic_write(job.with_name(f"answer-{rank}.pkl")) as staged:
            staged.write_bytes(pickle.dumps(answer))
    if answer.error is not None and not answer.stopped:
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
