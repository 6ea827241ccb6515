"""Processes of this machine that take jobs from one list; with GPUs each sees its own. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from rmoe.compare.engines.engine import Answer, Engine, Job, Wants
from rmoe.compare.engines.journal import JobState, note, state_of
from rmoe.compare.engines.process import Process, threads_of
from rmoe.errors import RequestError


class LocalEngine(Engine):
    """Worker processes that live as long as the engine.

    Args:
        slots: the GPUs each of them sees; empty for none.
        threads: of each, for its libraries.
        logs: folder for what they print.
        journal: the grid's folder, where the state of its jobs is noted; None notes nothing.
        retries: how often a job whose process died is started again.
        setup: shell lines before each of them starts.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[str]],
        threads: int,
        logs: Path,
        retries: int = 0,
        setup: Sequence[str] = (),
        journal: Path | None = None,
    ) -> None:
        self.journal = journal
        self.at_once, self.retries = f"{len(slots)} at once", retries
        self._wanted_gpus = max(map(len, slots))
        self._workers = [
            Process(
                threads_of(threads) | {"CUDA_VISIBLE_DEVICES": ",".join(seen)},
                logs / f"worker-{number}.log",
                setup,
            )
            for number, seen in enumerate(slots)
        ]
        self._idle: SimpleQueue[Process] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(slots))

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        if wants.gpus > self._wanted_gpus:
            raise RequestError("engine.gpus", wants.gpus, f"at most {self._wanted_gpus} on this machine")
        for name in jobs:
            self._note(name, "queued")
        futures: dict[Future[Answer], str] = {
            self._threads.submit(self._do, job, wants): name for name, job in jobs.items()
        }
        for future in as_completed(futures):
            answer = future.result()
            self._note(futures[future], state_of(answer))
            yield futures[future], answer

    def _note(self, name: str, state: JobState) -> None:
        if self.journal is not None:
            note(self.journal, name, state, "local")

    def close(self, interrupted: bool) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if interrupted:
            print("stopping: what is being trained saves a checkpoint first ...", file=sys.stderr, flush=True)
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def _do(self, job: Job, wants: Wants) -> Answer:
        worker = self._idle.get()
        try:
            return worker.do(job, wants, self.retries)
        finally:
            self._idle.put(worker)
