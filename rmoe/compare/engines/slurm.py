"""Slurm, through submitit: one array for a grid. Jobs outlive the comparison, which finds them when called again.

In a job a child process (`rmoe.compare.engines.child`) does the work. SIGTERM (preemption, scancel) makes it save and
ends the job without an answer: Slurm queues a preempted one again by itself (`--requeue`), and it resumes. Before the
time limit submitit's signal makes it save, and submitit queues it again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmoe.compare.engines.config import EngineConfig
from rmoe.compare.engines.devices import cores
from rmoe.compare.engines.engine import Answer, Engine, Job, Wants
from rmoe.compare.engines.journal import note, read_journal, state_of
from rmoe.compare.engines.process import Process, threads_of
from rmoe.errors import RequestError, one_line

POLL_SECONDS = 0.5
STATE_SECONDS = 30.0  # between questions to Slurm about all jobs
SECONDS_TO_SAVE = 120  # before the time limit
MOST_TIMEOUTS = 1000  # a run may take as many time limits as it needs
CHECK = ["sbatch", "--test-only"]


class Carried:
    """A job as submitit pickles it."""

    def __init__(self, job: Job, wants: Wants, threads: int, log: Path, config: EngineConfig) -> None:
        self.job, self.wants, self.threads, self.log, self.config = job, wants, threads, log, config
        self._process: Process | None = None

    def __call__(self) -> Answer:
        self._process = Process(threads_of(self.threads), self.log, self.config.setup)
        signal.signal(signal.SIGTERM, self._save)
        try:
            answer = self._process.do(self.job, self.wants, self.config.retries)
        finally:
            self._process.close()
        if answer.stopped:
            os._exit(
                128 + signal.SIGTERM
            )  # no answer: whoever asks sees a job that was ended, or its next start
        return answer

    def _save(self, _number: int, _frame: object) -> None:
        assert self._process is not None
        self._process.stop()

    def checkpoint(self) -> Any:
        """Submitit's signal, before the time limit: save, and be queued again."""
        from submitit.helpers import DelayedSubmission

        assert self._process is not None
        self._process.stop()
        self._process.wait()
        return DelayedSubmission(Carried(self.job, self.wants, self.threads, self.log, self.config))


class SlurmEngine(Engine):
    """One array for the jobs of a grid.

    Args:
        config: partition, time limit, jobs at once.
        out: the grid's folder, which every node must see.
        wants: of its runs; checked with Slurm at once.
        threads: of each process.

    Raises:
        RequestError: submitit or Slurm is not there, or Slurm has not what the runs want.
    """

    def __init__(self, config: EngineConfig, out: Path, wants: Wants, threads: int) -> None:
        try:
            import submitit
        except ImportError:
            raise RequestError("engine.kind", "slurm", "local, or `pip install rmoe[slurm]`") from None
        self.submitit, self.config, self.out, self.threads = submitit, config, out, threads
        self.folder = out / "engine" / "slurm"
        self.at_once = "in one array" + (f", {config.at_once} at once" if config.at_once else "")
        self._waiting: dict[str, Any] = {}
        if config.submitit == "slurm":
            self._ask_slurm(wants)

    def _ask_slurm(self, wants: Wants) -> None:
        missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
        if missing:
            allowed = f"a machine that submits to Slurm ({', '.join(missing)} is not here)"
            raise RequestError("engine.kind", "slurm", allowed)
        asked = [f"--cpus-per-task={wants.cpus}", f"--time={int(self.config.hours * 60)}"]
        asked += [f"--partition={self.config.partition}"] if self.config.partition else []
        asked += [f"--gpus-per-node={wants.gpus}"] if wants.gpus else []
        asked += [f"--mem={int(wants.memory_gib * 1024)}M"] if wants.memory_gib else []
        answer = subprocess.run([*CHECK, *asked, "--wrap=true"], capture_output=True, text=True, check=False)
        if answer.returncode:
            said = one_line(answer.stderr.strip() or answer.stdout) or f"status {answer.returncode}"
            field = "engine.partition" if "partition" in said.lower() else "engine"
            value = self.config.partition if field.endswith("partition") else " ".join(asked)
            raise RequestError(field, value, f"what this Slurm has ({said})")

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        self._waiting = self._found(jobs)
        if self._waiting:
            print(f"jobs found again: {len(self._waiting)}", file=sys.stderr, flush=True)
        todo = [name for name in jobs if name not in self._waiting]
        left = dict.fromkeys(jobs, self.config.retries)
        asked = time.monotonic()
        while todo or self._waiting:
            room = max(0, self._most(len(jobs), wants) - len(self._waiting))
            self._submit({name: jobs[name] for name in todo[:room]}, wants)
            del todo[:room]
            ask_state = time.monotonic() - asked > STATE_SECONDS or self.config.submitit == "local"
            asked = time.monotonic() if ask_state else asked
            for name, submitted in list(self._waiting.items()):
                answer = self._answer_of(submitted, ask_state)
                if answer is None:
                    continue
                if answer.lost and left[name]:
                    left[name] -= 1
                    note(self.out, name, "lost", "slurm", submitted.job_id)
                    todo.append(name)
                    del self._waiting[name]
                    continue
                del self._waiting[name]
                note(self.out, name, state_of(answer), "slurm", submitted.job_id)
                yield name, answer
            time.sleep(POLL_SECONDS)

    def _most(self, jobs: int, wants: Wants) -> int:
        """Jobs that may wait or run: submitit's local executor would start all at once, and an array limits itself."""
        if self.config.submitit == "local":
            return self.config.at_once or max(1, cores() // wants.cpus)
        return (self.config.at_once or jobs) if self._waiting else jobs

    def close(self, interrupted: bool) -> None:
        """Jobs stay in the queue: the same command finds them."""
        if self._waiting:
            ids = " ".join(submitted.job_id for submitted in self._waiting.values())
            print(
                f"{len(self._waiting)} jobs stay with Slurm; the same command finds them, "
                f"`scancel {ids}` ends them, each saving first",
                file=sys.stderr,
                flush=True,
            )

    def _found(self, jobs: Mapping[str, Job]) -> dict[str, Any]:
        """Jobs that an earlier call has submitted and nobody has had the answer of."""
        known = read_journal(self.out)
        kind = self.submitit.SlurmJob if self.config.submitit == "slurm" else self.submitit.LocalJob
        found = {}
        for name in jobs:
            entry = known.get(name)
            if entry is not None and entry.state == "queued" and entry.engine == "slurm" and entry.id:
                submitted: Any = kind(self.folder, entry.id)
                if not self._ended(submitted) or submitted.paths.result_pickle.exists():
                    found[name] = submitted
        return found

    def _submit(self, jobs: Mapping[str, Job], wants: Wants) -> None:
        if not jobs:
            return
        executor = self.submitit.AutoExecutor(
            self.folder, cluster=self.config.submitit, slurm_max_num_timeout=MOST_TIMEOUTS
        )
        slurm = {
            "partition": self.config.partition,
            "nodelist": wants.node,
            "exclusive": wants.alone or None,
            "array_parallelism": self.config.at_once or len(jobs),
            "signal_delay_s": SECONDS_TO_SAVE,
            "additional_parameters": {"requeue": True},
        }
        executor.update_parameters(
            name="rmoe",
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=wants.cpus,
            gpus_per_node=wants.gpus,
            timeout_min=int(self.config.hours * 60),
            **({"mem_gb": wants.memory_gib} if wants.memory_gib else {}),
            **{f"slurm_{name}": value for name, value in slurm.items() if value is not None},
        )
        submitted: list[Any] = []
        with executor.batch():
            for name, job in jobs.items():
                log = self.out / "logs" / f"{name}.log"
                submitted.append(executor.submit(Carried(job, wants, self.threads, log, self.config)))
        for name, one in zip(jobs, submitted, strict=True):
            note(self.out, name, "queued", "slurm", one.job_id)
            self._waiting[name] = one

    def _answer_of(self, submitted: Any, ask_state: bool) -> Answer | None:
        """None while it waits or runs."""
        ended = ask_state and self._ended(submitted)  # asked first: a job that ends in between has its answer
        if submitted.paths.result_pickle.exists():
            error = submitted.exception()
            if error is None:
                answer: Answer = submitted.result()
                return answer
            said = one_line((str(error).strip().splitlines() or ["no reason given"])[-1])
            return Answer(error=f"job {submitted.job_id}: {said}", lost=True)
        if not ended:
            return None
        state = self._state(submitted)
        if state.startswith("CANCELLED"):
            return Answer(error=f"job {submitted.job_id} was cancelled; it has saved", stopped=True)
        return Answer(
            error=f"job {submitted.job_id} ended without an answer ({state}); does its node see {self.out}?",
            lost=True,
        )

    def _state(self, submitted: Any) -> str:
        if self.config.submitit == "local":
            return str(submitted.state)
        return str(submitted.watcher.get_state(submitted.job_id, mode="standard"))

    def _ended(self, submitted: Any) -> bool:
        if self.config.submitit == "local":  # a job of an earlier call is no child of this process
            return submitted.state != "RUNNING" and not (
                submitted.state.startswith("NO PROCESS") and Path(f"/proc/{submitted.job_id}").exists()
            )
        return bool(submitted.watcher.is_done(submitted.job_id, mode="standard"))
