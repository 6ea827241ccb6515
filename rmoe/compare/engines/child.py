"""A process that carries jobs out: pickled jobs come on stdin, pickled answers go to stdout.

    python -m rmoe.compare.engines.child

It imports torch once and then does job after job. When stdin closes, whoever started it is gone: a run in progress is
saved and the process ends, so a killed comparison, Ray worker or Slurm job leaves no process behind.
"""

from __future__ import annotations

import gc
import os
import pickle  # nosec B403  what is read was written by the process that started this one
import queue
import signal
import sys
import threading
import traceback
from typing import BinaryIO

from rmoe.compare.engines.engine import Answer, Failed, Job
from rmoe.errors import RequestError, RunError, Stopped, one_line


def main() -> None:
    """Serve until stdin closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the answers
    jobs: queue.Queue[Job | None] = queue.Queue()
    busy, alone = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, jobs, busy, alone), daemon=True).start()
    while (job := jobs.get()) is not None:
        busy.set()
        if alone.is_set():  # after `busy`: either this or the listener sees the other's
            break
        answer = answer_to(job)
        busy.clear()
        _release_gpu_cache()
        _say(answers, answer)


def _listen(
    stdin: BinaryIO, jobs: queue.Queue[Job | None], busy: threading.Event, alone: threading.Event
) -> None:
    try:
        while True:
            jobs.put(pickle.load(stdin))  # nosec B301
    except EOFError:
        pass
    finally:  # also after a job that cannot be read, which is no answer
        alone.set()
        jobs.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # `train` saves and stops


def _say(answers: BinaryIO, answer: Answer) -> None:
    try:
        answers.write(pickle.dumps(answer))  # buffered: one write of the system's takes 2 GiB at most
        answers.flush()
    except BrokenPipeError:  # nobody is left to hear it; the run is saved in its folder
        os._exit(1)


def _release_gpu_cache() -> None:
    """Give a GPU back what torch keeps for its next tensors: the next job there may be another process's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def answer_to(job: Job) -> Answer:
    """Carry a job out; whatever goes wrong is the answer."""
    try:
        return Answer(value=job.carry_out())
    except Stopped as stopped:
        return Answer(error=str(stopped), stopped=True)
    except (RequestError, RunError, Failed) as error:
        return Answer(error=str(error))
    except Exception as error:
        traceback.print_exc()  # the log has all of it
        return Answer(error=one_line(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
