"""Processes of this machine that take jobs from one list; with GPUs each sees its own. Imports no torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rmoe.compare.engines.engine import Answer, Engine, Job, Wants
from rmoe.compare.engines.journal import JobState, note, state_of
from rmoe.compare.engines.process import Process, threads_of
from rmoe.errors import RequestError

SIMULATED = "RMOE_SIMULATED_DEVICES"


def devices() -> list[str]:
    """The GPUs this process may use, as `CUDA_VISIBLE_DEVICES` names them; `RMOE_SIMULATED_DEVICES=N` pretends N."""
    if SIMULATED in os.environ:
        return [str(number) for number in range(int(os.environ[SIMULATED]))]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def slots_of(jobs: int | None, gpus: int, runs_per_gpu: int) -> list[list[str]]:
    """What each run that computes on GPUs sees: its own block of devices.

    Args:
        jobs: runs at once, at most; None is as many as fit.
        gpus: of each run.
        runs_per_gpu: that share a block.

    Raises:
        RequestError: a run wants more than there are.
    """
    found = devices()
    if gpus > len(found):
        raise RequestError("engine.gpus", gpus, f"at most {len(found)}, the GPUs of this machine")
    blocks = [found[start : start + gpus] for start in range(0, len(found) - gpus + 1, gpus)]
    slots = [block for _ in range(runs_per_gpu) for block in blocks]
    return slots[:jobs]


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
        self._idle = [
            Process(
                threads_of(threads) | ({"CUDA_VISIBLE_DEVICES": ",".join(seen)} if seen else {}),
                logs / f"worker-{number}.log",
                setup,
            )
            for number, seen in enumerate(slots)
        ]
        self._workers = list(self._idle)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(len(slots))

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        if wants.gpus > self._wanted_gpus:
            raise RequestError("engine.gpus", wants.gpus, f"at most {self._wanted_gpus} on this machine")
        for name in jobs:
            self._note(name, "queued")
        futures: dict[Future[Answer], str] = {
            self._threads.submit(self._do, job, wants): name for name, job in jobs.items()
        }
        waiting = set(futures)
        while waiting:  # a timeout lets Ctrl-C through
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED, timeout=0.5)
            for future in done:
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
            worker.finish()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def _do(self, job: Job, wants: Wants) -> Answer:
        with self._lock:
            worker = self._idle.pop(0)
        try:
            return worker.do(job, wants, self.retries)
        finally:
            with self._lock:
                self._idle.append(worker)
