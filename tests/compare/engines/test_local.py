"""The local engine: answers, deaths, pinned devices, the end of whoever started it."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rmoe
from rmoe.compare.engines import Wants
from rmoe.compare.engines.child import _say, answer_to
from rmoe.compare.engines.devices import slots_of
from rmoe.compare.engines.engine import Answer, Failed
from rmoe.compare.engines.fetch import Fetched
from rmoe.compare.engines.local import LocalEngine
from rmoe.compare.engines.process import CHILD, Process
from rmoe.errors import RequestError
from tests.compare.engines.jobs import Count, Crash, Environment, Fail, OneRankFails, Rank, RankFiles

ROOT = Path(__file__).parents[3]


def test_answers_come_by_name_and_a_failure_is_one_line(tmp_path):
    with LocalEngine([[], []], 1, tmp_path) as engine:
        jobs = {"a": Environment(names=["OMP_NUM_THREADS"]), "b": Fail()}
        answers = dict(engine.answers(jobs, Wants()))
        assert answers["a"].value["OMP_NUM_THREADS"] == "1"
        assert answers["a"].value["pid"] != os.getpid()
        assert answers["b"].error.startswith("the loss is NaN; saved: nothing")
        assert not answers["b"].lost
        again = dict(engine.answers(dict.fromkeys("xyz", Environment(names=[])), Wants()))
        assert len({answer.value["pid"] for answer in again.values()}) <= 2  # the same processes
    assert (tmp_path / "worker-0.log").exists()


@pytest.mark.parametrize(("retries", "times", "value"), [(2, 2, 3), (1, 2, None), (0, 1, None), (0, 0, 1)])
def test_a_job_whose_process_dies_is_started_again_so_often(retries, times, value, tmp_path):
    with LocalEngine([[]], 1, tmp_path / "logs", retries) as engine:
        jobs = {
            "crash": Crash(attempts=str(tmp_path / "attempts"), times=times),
            "next": Environment(names=[]),
        }
        answers = dict(engine.answers(jobs, Wants()))
    assert answers["crash"].value == value
    assert answers["crash"].lost == (value is None)
    if value is None:
        assert answers["crash"].error.startswith("the worker process ended by signal 9; see ")
    assert answers["next"].error is None  # whoever comes next has a process


def test_with_two_devices_each_run_sees_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RMOE_SIMULATED_DEVICES", "2")
    with LocalEngine(slots_of(None, 1, 1), 1, tmp_path) as engine:
        job = Environment(names=["CUDA_VISIBLE_DEVICES"], seconds=0.3)
        answers = dict(engine.answers({str(n): job for n in range(6)}, Wants(gpus=1)))
        with pytest.raises(RequestError, match=r"engine.gpus is 2; allowed: at most 1"):
            list(engine.answers({"0": job}, Wants(gpus=2)))
    by_device: dict[str, set[int]] = {}
    for answer in answers.values():
        by_device.setdefault(answer.value["CUDA_VISIBLE_DEVICES"], set()).add(answer.value["pid"])
    assert sorted(by_device) == ["0", "1"]
    assert all(len(pids) == 1 for pids in by_device.values())


def test_runs_without_gpus_see_none(tmp_path, monkeypatch):
    """`--engine.gpus 0` on a machine that has some."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with LocalEngine([[]], 1, tmp_path) as engine:
        jobs = {"0": Environment(names=["CUDA_VISIBLE_DEVICES"])}
        (answer,) = dict(engine.answers(jobs, Wants())).values()
    assert answer.value["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("visible", "jobs", "gpus", "per_gpu", "slots"),
    [
        ("0,1", None, 1, 1, [["0"], ["1"]]),
        ("0,1", None, 1, 2, [["0"], ["1"], ["0"], ["1"]]),
        ("4,5,6,7,9", None, 2, 1, [["4", "5"], ["6", "7"]]),
        ("0,1", 1, 1, 1, [["0"]]),
        ("GPU-a,GPU-b", None, 1, 1, [["GPU-a"], ["GPU-b"]]),
        ("0", None, 2, 1, "engine.gpus is 2; allowed: at most 1, the GPUs of this machine"),
    ],
)
def test_devices_are_dealt_out_in_blocks(visible, jobs, gpus, per_gpu, slots, monkeypatch):
    monkeypatch.delenv("RMOE_SIMULATED_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if isinstance(slots, str):
        with pytest.raises(RequestError, match=slots):
            slots_of(jobs, gpus, per_gpu)
    else:
        assert slots_of(jobs, gpus, per_gpu) == slots


def test_set_up_lines_come_first_and_their_failure_is_said(tmp_path):
    with LocalEngine([[]], 1, tmp_path, setup=("export GREETING='a b'",)) as engine:
        (answer,) = dict(engine.answers({"0": Environment(names=["GREETING"])}, Wants())).values()
    assert answer.value["GREETING"] == "a b"
    with LocalEngine([[]], 1, tmp_path / "said", setup=("echo Loading cuda/12.4",)) as engine:
        (answer,) = dict(engine.answers({"0": Environment(names=[])}, Wants())).values()
    assert answer.error is None
    assert "Loading cuda/12.4" in "".join(f.read_text() for f in (tmp_path / "said").iterdir())
    with LocalEngine([[]], 1, tmp_path, setup=("false", "true")) as engine:
        (answer,) = dict(engine.answers({"0": Environment(names=[])}, Wants())).values()
    assert answer.lost
    assert "ended with status 1" in answer.error


@pytest.mark.parametrize("said", ["no pickle", "Loading cuda/12.4", "N."])  # the last one is: of None
def test_a_child_that_writes_something_else_is_ended_and_said(said, tmp_path, monkeypatch):
    monkeypatch.setattr("rmoe.compare.engines.process.CHILD", ["sh", "-c", f"echo {said}; cat > /dev/null"])
    process = Process({}, tmp_path / "log")
    answer = process.do(Environment(names=[]), Wants())
    assert answer.lost
    assert "by signal 9" in answer.error
    process.close()


def test_an_answer_is_whole_however_little_the_system_takes_at_once():
    """Linux writes 2 GiB at most in one call; here each call takes three bytes."""

    class Narrow(io.RawIOBase):
        def __init__(self):
            self.written = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.written += bytes(data[:3])
            return min(len(data), 3)

    raw = Narrow()
    _say(io.BufferedWriter(raw, 16), Answer(value=list(range(100))))
    assert pickle.loads(bytes(raw.written)) == Answer(value=list(range(100)))


def test_leaving_early_lets_what_runs_save(tmp_path):
    file = tmp_path / "count"
    with LocalEngine([[]], 1, tmp_path / "logs", retries=5) as engine:
        answers = engine.answers(
            {"quick": Environment(names=[]), "long": Count(file=str(file), steps=10_000)}, Wants()
        )
        assert next(answers)[0] == "quick"
        while not file.exists():
            time.sleep(0.05)
    assert 1 <= len(file.read_bytes().split()) < 10_000


def test_a_killed_parent_leaves_no_process(tmp_path):
    file = tmp_path / "count"
    code = (
        "import sys; from pathlib import Path; from rmoe.compare.engines import *;"
        "from rmoe.compare.engines.local import LocalEngine; from tests.compare.engines.jobs import Count;"
        f"engine = LocalEngine([[]], 1, Path({str(tmp_path)!r}));"
        f"list(engine.answers({{'0': Count(file={str(file)!r}, steps=10_000)}}, Wants()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (file.exists() and len(file.read_text().split("-")) > 1):  # there is the file before its text
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pid = int(file.read_text().split("-")[1])
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_a_job_whose_parent_is_gone_before_it_starts_is_not_carried_out(tmp_path):
    """Both are read at once: the job, and that nobody waits for its answer."""
    for trial in range(4):
        file = tmp_path / str(trial)
        child = subprocess.Popen(CHILD, stdin=subprocess.PIPE, cwd=ROOT)
        child.communicate(pickle.dumps(Count(file=str(file), steps=100)), timeout=60)
        assert not file.exists() or len(file.read_bytes().split()) < 100


def test_a_job_that_cannot_be_read_is_lost(tmp_path):
    class Here(Environment, frozen=True):
        """A class that no other process knows."""

    Here.__qualname__, Here.__module__ = "Nowhere", "rmoe"
    vars(rmoe)["Nowhere"] = Here
    try:
        with LocalEngine([[]], 1, tmp_path) as engine:
            answers = dict(engine.answers({"0": Here(names=[]), "1": Environment(names=[])}, Wants()))
    finally:
        del vars(rmoe)["Nowhere"]
    assert answers["0"].lost
    assert "ended with status 0; see " in answers["0"].error
    assert answers["1"].error is None


@pytest.mark.slow
def test_a_job_of_two_processes(tmp_path):
    with LocalEngine([[]], 1, tmp_path) as engine:
        answers = dict(engine.answers({"sum": Rank(), "fail": Fail()}, Wants(processes=2)))
    assert answers["sum"].value == (2, 1)
    assert "the loss is NaN" in answers["fail"].error


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_and_says_why(tmp_path):
    begun = time.monotonic()
    with LocalEngine([[]], 1, tmp_path) as engine:
        ((_, answer),) = engine.answers({"run": OneRankFails()}, Wants(processes=2))
    assert answer.error == "RuntimeError: CUDA out of memory"
    assert time.monotonic() - begun < 55


@pytest.mark.slow
def test_ranks_whose_run_is_fetched_have_one_folder(tmp_path):
    job = Fetched(job=RankFiles(folder=""), what="result")
    with LocalEngine([[]], 1, tmp_path) as engine:
        ((_, answer),) = engine.answers({"run": job}, Wants(processes=2))
    assert answer.value == (2, {"rank-0": b"0", "rank-1": b"1"})


def test_the_line_of_a_job_inside_a_job_is_said_once():
    class Inside:
        def carry_out(self) -> None:
            raise Failed(answer_to(Fail()).error)

    assert answer_to(Inside()).error == answer_to(Fail()).error
