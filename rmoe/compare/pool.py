"""Worker processes, as the comparison sees them: give a job, wait for its answer. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import msgspec

from rmoe.compare.jobs import Answer, Job

T = TypeVar("T")


class Worker:
    """One process of `rmoe.compare.worker`; started with the first job, and again after it died.

    Args:
        threads: its environment's, for libraries that read their number of threads only once.
        log: where what it prints is kept.
    """

    def __init__(self, threads: int, log: Path) -> None:
        self.threads, self.log = threads, log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process, if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = open(self.log, "ab")  # noqa: SIM115  open as long as the process
        threads = str(self.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rmoe.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches the comparison, which lets its workers save
        )

    def do(self, job: Job) -> Answer:
        """Have a job done. A worker that died answers with an error that says how."""
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line.endswith(b"\n"):
            return msgspec.json.decode(line, type=Answer)
        status = process.wait()
        self.close()
        cause = f"by signal {-status}" if status < 0 else f"with status {status}"
        return Answer(error=f"the worker process ended {cause}; see {self.log}")

    def finish(self) -> None:
        """Let it end: when its stdin closes it saves what it is training. Waits until it is gone."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()

    def close(self) -> None:
        """Give its files back, once it has ended and nobody waits for an answer."""
        self.finish()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        if self._log_file is not None:
            self._log_file.close()
        self._process = self._log_file = None


class Pool:
    """Several workers that take jobs from one list.

    Args:
        jobs: how many at once.
        threads: of each.
        logs: folder for what they print.
    """

    def __init__(self, jobs: int, threads: int, logs: Path) -> None:
        self._idle = [Worker(threads, logs / f"worker-{number}.log") for number in range(jobs)]
        self._workers = list(self._idle)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            print("stopping: what is being trained saves a checkpoint first ...", file=sys.stderr, flush=True)
        for worker in self._workers:
            worker.finish()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def map(self, items: Iterable[T], job: Callable[[T], Job], each: Callable[[T, Answer], None]) -> None:
        """Do a job for every item; `each` is called in this thread as answers come, in any order."""
        futures: dict[Future[Answer], T] = {self._threads.submit(self._do, job(item)): item for item in items}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED, timeout=0.5)
            for future in done:
                each(futures[future], future.result())

    def _do(self, job: Job) -> Answer:
        with self._lock:
            worker = self._idle.pop()
        try:
            return worker.do(job)
        finally:
            with self._lock:
                self._idle.append(worker)
