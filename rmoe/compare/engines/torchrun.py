"""A job that runs as several processes, started by `torchrun`; the first rank's value is the answer."""

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

from rmoe.compare.engines.engine import Answer, Failed, Job, Wants
from rmoe.errors import RunError, Stopped
from rmoe.records import Record


def spread(job: Job, wants: Wants) -> Job:
    """The job as the processes it wants."""
    return job if wants.processes == 1 else Spread(job=job, processes=wants.processes)


class Spread(Record, frozen=True, kw_only=True):
    """A job on several devices of one machine."""

    job: Any
    processes: int

    def carry_out(self) -> Any:
        """Start `torchrun`, and pass SIGTERM on to it, so that every rank saves."""
        with tempfile.TemporaryDirectory() as scratch:
            asked, answered = Path(scratch, "job.pkl"), Path(scratch, "answer.pkl")
            asked.write_bytes(pickle.dumps(self.job))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(self.processes), "-m", __name__, str(asked), str(answered)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self._wait(process)
            if not answered.exists():
                raise RunError(
                    f"torchrun ended with status {process.returncode}",
                    "checkpoints in the run's folder",
                    "run the same command again",
                )
            answer: Answer = pickle.loads(answered.read_bytes())  # nosec B301
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


def main(asked: str, answered: str) -> None:
    """One rank."""
    from rmoe.compare.engines.child import answer_to

    answer = answer_to(pickle.loads(Path(asked).read_bytes()))  # nosec B301
    if os.environ["RANK"] == "0":
        Path(answered).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
