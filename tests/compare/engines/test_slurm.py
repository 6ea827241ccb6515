"""The slurm engine on submitit's local executor, and on stand-in programs for what it asks of Slurm."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("submitit")

from rmoe.cli.main import main
from rmoe.compare.engines import EngineConfig, Wants
from rmoe.compare.engines import slurm as engine_module
from rmoe.compare.engines.engine import Answer
from rmoe.compare.engines.journal import read_journal
from rmoe.compare.engines.slurm import SlurmEngine
from rmoe.errors import RequestError
from tests.compare.engines.jobs import Count, Crash, Environment, Fail

ROOT = Path(__file__).parents[3]
FAKE = Path(__file__).with_name("fake_slurm.py")
LOCAL = EngineConfig(kind="slurm", submitit="local")
ON_SLURM = EngineConfig(kind="slurm", partition="cpu", hours=0.1, at_once=2)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The stand-ins on the path; gives a function that calls one of them."""
    programs, state = tmp_path / "bin", tmp_path / "state"
    programs.mkdir()
    state.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol", "squeue"):
        path = programs / name
        call = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        path.write_text(
            f"#!{sys.executable}\n{call}import tests.compare.engines.fake_slurm as fake\n"
            f"fake.{name}(sys.argv[1:])\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setattr(engine_module, "STATE_SECONDS", 0.5)
    import submitit

    submitit.SlurmJob.watcher.clear()

    def call(name: str, *arguments: str) -> None:
        code = f"import tests.compare.engines.fake_slurm as fake; fake.{name}({list(arguments)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    return call


@pytest.mark.slow
def test_submitit_local_answers_and_failures(tmp_path):
    with SlurmEngine(LOCAL, tmp_path, Wants(), threads=1) as engine:
        jobs = {
            "a": Environment(names=["OMP_NUM_THREADS"]),
            "b": Fail(),
            "c": Crash(attempts=str(tmp_path / "n"), times=1),
        }
        answers = dict(engine.answers(jobs, Wants()))
    assert answers["a"].value["OMP_NUM_THREADS"] == "1"
    assert answers["b"].error.startswith("the loss is NaN")
    assert answers["c"].value == 2
    assert {name: entry.state for name, entry in read_journal(tmp_path).items()} == {
        "a": "answered",
        "b": "failed",
        "c": "answered",
    }


@pytest.mark.slow
def test_submitit_local_starts_as_many_as_the_machine_carries(tmp_path):
    """Two at once say so in a file; its executor alone would start all."""
    config = EngineConfig(kind="slurm", submitit="local", at_once=2)
    files = [tmp_path / str(number) for number in range(4)]
    jobs = {file.name: Count(file=str(file), steps=20) for file in files}
    with SlurmEngine(config, tmp_path, Wants(), threads=1) as engine:
        answers = engine.answers(jobs, Wants())
        next(answers)
        assert sum(file.exists() for file in files) <= 3  # the two, and one that has taken a place
        assert len(dict(answers)) == 3
    assert all(len(file.read_text().split()) == 20 for file in files)


def test_a_job_that_ends_while_slurm_is_asked_has_its_answer(tmp_path, monkeypatch):
    def ends_now(engine, submitted):
        submitted.wait()
        return True

    monkeypatch.setattr(SlurmEngine, "_ended", ends_now)
    config = EngineConfig(kind="slurm", submitit="local", retries=0)
    with SlurmEngine(config, tmp_path, Wants(), threads=1) as engine:
        (answer,) = dict(engine.answers({"a": Environment(names=["OMP_NUM_THREADS"])}, Wants())).values()
    assert (answer.error, answer.lost) == (None, False)
    assert answer.value["OMP_NUM_THREADS"] == "1"


def test_one_array_with_what_a_run_wants(slurm, tmp_path):
    out = tmp_path / "out"
    with SlurmEngine(ON_SLURM, out, Wants(cpus=2), threads=2) as engine:
        jobs = {str(n): Environment(names=["OMP_NUM_THREADS"]) for n in range(3)}
        answers = dict(engine.answers(jobs, Wants(cpus=2, gpus=1, memory_gib=4.0, node="n1", alone=True)))
    assert {answer.value["OMP_NUM_THREADS"] for answer in answers.values()} == {"2"}
    (script,) = (tmp_path / "state").glob("*.sh")
    asked = set(re.findall(r"^#SBATCH (\S+)$", script.read_text(), re.MULTILINE))
    assert {
        "--array=0-2%2",
        "--partition=cpu",
        "--cpus-per-task=2",
        "--gpus-per-node=1",
        "--mem=4GB",
        "--nodelist=n1",
        "--exclusive",
        "--requeue",
        "--time=6",
        "--signal=USR2@120",
    } <= asked


def _started(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["preempt", "timeout"])
def test_preempted_it_saves_is_queued_again_and_resumes(signal, slurm, tmp_path):
    file, out = tmp_path / "count", tmp_path / "out"
    with SlurmEngine(ON_SLURM, out, Wants(), threads=1) as engine:
        jobs = {"0": Count(file=str(file), steps=60), "1": Environment(names=[])}
        answers = engine.answers(jobs, Wants())
        first = next(answers)
        assert first[0] == "1"
        _started(file)
        slurm(signal, "100_0")
        assert dict(answers)["0"].value == 60
    lines = [line.split("-") for line in file.read_text().split()]
    assert [int(line[0]) for line in lines] == list(range(60))  # nothing twice
    assert len({line[1] for line in lines}) == 2  # by two processes


@pytest.mark.slow
def test_cancelled_it_saves_and_the_caller_is_told(slurm, tmp_path):
    file = tmp_path / "count"
    with SlurmEngine(ON_SLURM, tmp_path / "out", Wants(), threads=1) as engine:
        jobs = {"0": Count(file=str(file), steps=10_000), "1": Environment(names=[])}
        answers = engine.answers(jobs, Wants())
        next(answers)
        _started(file)
        slurm("scancel", "100_0")
        (answer,) = dict(answers).values()
    assert answer.stopped
    assert "job 100_0 was cancelled" in answer.error


@pytest.mark.slow
def test_left_and_called_again_it_finds_its_jobs(slurm, tmp_path, capsys):
    file, out = tmp_path / "count", tmp_path / "out"
    jobs = {"0": Count(file=str(file), steps=100), "1": Environment(names=[])}
    with SlurmEngine(ON_SLURM, out, Wants(), threads=1) as engine:
        assert next(engine.answers(jobs, Wants()))[0] == "1"
    assert (
        "1 jobs stay with Slurm; the same command finds them, `scancel 100_0` ends them"
        in capsys.readouterr().err
    )
    with SlurmEngine(ON_SLURM, out, Wants(), threads=1) as engine:
        answers = dict(engine.answers(jobs, Wants()))
    assert answers["0"].value == 100
    lines = [line.split("-") for line in file.read_text().split()]
    assert len({line[1] for line in lines}) == 1  # one process: it was never submitted again
    assert len(lines) == 100


@pytest.mark.parametrize(
    ("config", "wants", "said"),
    [
        (
            EngineConfig(kind="slurm", partition="nope"),
            Wants(),
            "engine.partition is 'nope'; allowed: what this Slurm has (sbatch: error: invalid",
        ),
        (
            EngineConfig(kind="slurm"),
            Wants(gpus=64),
            "--gpus-per-node=64'; allowed: what this Slurm has (sbatch: error: Requested node",
        ),
    ],
)
def test_what_slurm_has_not_is_one_line(slurm, config, wants, said, tmp_path):
    with pytest.raises(RequestError, match=re.escape(said)):
        SlurmEngine(config, tmp_path / "out", wants, threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_slurm_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (tmp_path / "text.txt").write_text("".join(f"line {i * 7919 % 101}\n" for i in range(3000)))
    monkeypatch.chdir(tmp_path)
    asked = [
        "--routers",
        "smoe",
        "--preset",
        "quick",
        "--data",
        "text.txt",
        "--engine",
        "slurm",
        "--out",
        "out",
    ]
    assert main(["compare", *asked]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "error: engine.kind is 'slurm'; allowed: a machine that submits to Slurm (sbatch, srun"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RequestError, match=re.escape("local, or `pip install rmoe[slurm]`")):
        SlurmEngine(LOCAL, tmp_path, Wants(), threads=1)


def test_a_lost_job_waits_until_one_of_the_others_has_ended(slurm, tmp_path, monkeypatch):
    """Submitted again it is an array of its own, which knows no other's limit."""
    submitted: list[tuple[list[str], int]] = []
    said = {
        "a": [Answer(error="its node died", lost=True), Answer(value=1)],
        "b": [None, None, Answer(value=2)],
    }
    said["c"] = [None, None, None, None, Answer(value=3)]

    def submit(engine, jobs, wants):
        if jobs:
            submitted.append((list(jobs), len(engine._waiting)))
        engine._waiting |= {name: SimpleNamespace(job_id=name) for name in jobs}

    monkeypatch.setattr(SlurmEngine, "_submit", submit)
    monkeypatch.setattr(SlurmEngine, "_answer_of", lambda engine, job, ask: said[job.job_id].pop(0))
    monkeypatch.setattr(engine_module, "POLL_SECONDS", 0.0)
    with SlurmEngine(ON_SLURM, tmp_path, Wants(), threads=1) as engine:
        answers = dict(engine.answers(dict.fromkeys("abc", Fail()), Wants()))
    assert {name: answer.value for name, answer in answers.items()} == {"a": 1, "b": 2, "c": 3}
    assert submitted == [(["a", "b", "c"], 0), (["a"], 1)]
