"""A worker process: reads jobs from stdin, one JSON line each, and answers on stdout.

    python -m rmoe.compare.worker

It imports torch once and then trains run after run. When stdin closes, its parent is gone: a run in progress is
saved and the process ends, so a killed comparison leaves no process behind.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

import msgspec

from rmoe.compare.jobs import Answer, Job, Judge, Measure, Time, Train
from rmoe.errors import RequestError, RunError, one_line
from rmoe.training.config import RunConfig


def main() -> None:
    """Serve until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the answers
    jobs: queue.Queue[Job | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(jobs, busy), daemon=True).start()
    while (job := jobs.get()) is not None:
        busy.set()
        answer = answer_to(job)
        busy.clear()
        _say(answers, answer)


def _listen(jobs: queue.Queue[Job | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        jobs.put(msgspec.json.decode(line, type=Job))
    jobs.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # `train` saves and stops


def _say(answers: TextIO, answer: Answer) -> None:
    try:
        answers.write(msgspec.json.encode(answer).decode() + "\n")
    except BrokenPipeError:  # nobody is left to hear it; the run is saved in its folder
        os._exit(1)


def answer_to(job: Job) -> Answer:
    """Carry a job out; whatever goes wrong is the answer."""
    from rmoe.training.stopping import Stopped

    try:
        return Answer(value=msgspec.to_builtins(_carry_out(job)))
    except Stopped as stopped:
        return Answer(error=str(stopped), stopped=True)
    except (RequestError, RunError) as error:
        return Answer(error=str(error))
    except Exception as error:
        import traceback

        traceback.print_exc()  # the log has all of it
        return Answer(error=one_line(f"{type(error).__name__}: {error}"))


def _carry_out(job: Job) -> Any:
    config = RunConfig.from_dict(job.config)
    match job:
        case Train(folder=folder, branch_of=branch_of):
            from rmoe.training.run import train

            resume = Path(folder, "config.json").exists()
            longer = None if branch_of is None else Path(branch_of)
            return train(config, Path(folder), resume=resume, progress=False, branch_of=longer)
        case Judge(folder=folder):
            from rmoe.compare.evaluate import evaluate_test

            return evaluate_test(config, Path(folder))
        case Time(steps=steps):
            from rmoe.compare.timing import time_steps

            return time_steps(config, steps)
        case Measure(folder=folder, name=name, tokens=tokens):
            from rmoe.compare.evaluate import measure_routing

            return measure_routing(config, Path(folder), name, tokens)


if __name__ == "__main__":
    main()
