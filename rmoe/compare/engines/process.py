"""A child process as whoever starts it sees it: give it a job, wait for the answer. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import pickle  # nosec B403  what is read was written by a process started here
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from rmoe.compare.engines.engine import Answer, Job, Wants
from rmoe.compare.engines.torchrun import spread

CHILD = [sys.executable, "-m", "rmoe.compare.engines.child"]


def threads_of(cpus: int) -> dict[str, str]:
    """The environment of a process with so many threads, for libraries that read their number only once."""
    return {"OMP_NUM_THREADS": str(cpus), "MKL_NUM_THREADS": str(cpus)}


class Process:
    """One process of `rmoe.compare.engines.child`; started with the first job, and again after it died.

    Args:
        environment: its own variables, over this process's.
        log: where what it prints is kept.
        setup: shell lines before it starts.
        folder: where it runs; default is this process's.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        log: Path,
        setup: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        self.environment, self.log, self.setup, self.folder = environment, log, setup, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()

    def start(self) -> None:
        """Start the process, if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = CHILD
        if self.setup:
            # Answers go to stdout; what the lines print goes to the log.
            lines = ["set -e", "exec 3>&1 1>&2", *self.setup, 'exec "$@" 1>&3 3>&-']
            command = ["bash", "-c", "\n".join(lines), "setup", *CHILD]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                start_new_session=True,  # Ctrl-C reaches whoever started it, who lets it save
            )

    def do(self, job: Job, wants: Wants, retries: int = 0) -> Answer:
        """Have a job done; one whose process dies is started again, so many times."""
        while not self._closing.is_set():
            answer = self._once(spread(job, wants))
            if not answer.lost or not retries:
                return answer
            retries -= 1
        return Answer(error="stopped before it began", stopped=True)

    def _once(self, job: Job) -> Answer:
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        if self._closing.is_set():  # since `do` has looked
            self.stop()
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended; stdin is closed
            process.stdin.write(pickle.dumps(job))
            process.stdin.flush()
        try:
            answer = pickle.load(process.stdout)  # nosec B301
            if isinstance(answer, Answer):
                return answer
            process.kill()
        except EOFError:
            pass
        except Exception:  # what it wrote is no pickle, and it waits for its next job
            process.kill()
        status = process.wait()
        self._free()
        if self._closing.is_set():
            return Answer(error="stopped; its last checkpoint stays", stopped=True)
        cause = f"by signal {-status}" if status < 0 else f"with status {status}"
        return Answer(error=f"the worker process ended {cause}; see {self.log}", lost=True)

    def stop(self) -> None:
        """Let it end: when its stdin closes it saves what it is training, answers and is gone. Waits for nothing."""
        self._closing.set()
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def wait(self) -> None:
        """Until it is gone."""
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """Let it end and give its files back, once nobody waits for an answer."""
        self.stop()
        self._free()

    def _free(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError), self._process:
                pass  # closes its pipes, then waits
            self._process = None
