"""A Slurm of one file: `sbatch`, `srun`, `sacct`, `scancel`, `scontrol`, by the name it is called under.

State lies in $FAKE_SLURM: `<job>_<index>` has `STATE PID`; `<job>_<index>.requeue` asks for another start.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

STATE = Path(os.environ.get("FAKE_SLURM", "no state"))
PARTITIONS, MOST_GPUS = ("cpu", "gpu"), 4


def option(arguments: list[str], name: str) -> str | None:
    found = [a.partition("=")[2].strip("'") for a in arguments if a.startswith(f"--{name}=")]
    return found[-1] if found else None


def put(path: Path, text: str) -> None:
    """In one piece: others read it at any moment."""
    staged = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    staged.write_text(text)
    staged.rename(path)


def refuse(arguments: list[str]) -> None:
    partition, gpus = option(arguments, "partition"), option(arguments, "gpus-per-node")
    if partition is not None and partition not in PARTITIONS:
        sys.exit(f"sbatch: error: invalid partition specified: {partition}")
    if gpus is not None and int(gpus) > MOST_GPUS:
        sys.exit("sbatch: error: Requested node configuration is not available")


def sbatch(arguments: list[str]) -> None:
    if "--test-only" in arguments:
        refuse(arguments)
        return
    script = Path(arguments[-1]).read_text()
    options = re.findall(r"^#SBATCH (--\S+)$", script, re.MULTILINE)
    refuse(options)
    job = 100 + len(list(STATE.glob("*.sh")))
    (STATE / f"{job}.sh").write_text(script)
    last, _, at_once = (option(options, "array") or "0-0%1").removeprefix("0-").partition("%")
    for index in range(int(last) + 1):
        put(STATE / f"{job}_{index}", "PENDING 0")
    command = [sys.executable, __file__, "daemon", str(job), last, at_once, str("--array" in script)]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
    print(f"Submitted batch job {job}")


def daemon(job: str, last: str, at_once: str, is_array: str) -> None:
    def run(index: int) -> None:
        state, requeue = STATE / f"{job}_{index}", STATE / f"{job}_{index}.requeue"
        environment = {**os.environ, "SLURM_JOB_ID": job, "SLURM_PROCID": "0"}
        if is_array == "True":
            environment |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(index)}
        while not state.read_text().startswith("CANCELLED"):
            requeue.unlink(missing_ok=True)
            process = subprocess.Popen(
                ["bash", str(STATE / f"{job}.sh")], env=environment, start_new_session=True
            )
            put(state, f"RUNNING {process.pid}")
            status = process.wait()
            if not requeue.exists() and not state.read_text().startswith("CANCELLED"):
                put(state, "COMPLETED 0" if status == 0 else "FAILED 0")
                return

    with ThreadPoolExecutor(int(at_once)) as pool:
        list(pool.map(run, range(int(last) + 1)))


def srun(arguments: list[str]) -> None:
    out = option([f"{a}={b}" for a, b in pairwise(arguments)], "output")
    command = arguments[arguments.index("--error") + 2 :]
    with open(str(out).replace("%A_%a", "log").replace("%j", "log").replace("%t", "0"), "ab") as log:
        sys.exit(
            subprocess.run(["bash", "-c", " ".join(command)], stdout=log, stderr=log, check=False).returncode
        )


def sacct(_: list[str]) -> None:
    print("JobID|State|NodeList")
    for path in sorted(STATE.glob("*_*")):
        if not path.suffix:
            job = path.name.partition("_")[0]
            state = path.read_text().split()[0]
            print(f"{path.name}|{state}|here")
            if "--array" not in (STATE / f"{job}.sh").read_text():
                print(f"{job}|{state}|here")


def squeue(_: list[str]) -> None:
    for path in sorted(STATE.glob("*_*")):
        if not path.suffix and path.read_text().split()[0] in ("PENDING", "RUNNING"):
            print(path.name)


def _tell(names: list[str], number: signal.Signals) -> None:
    for name in names:
        pid = int((STATE / name).read_text().split()[1])
        if pid:
            # A step's processes get the signal, the batch script does not.
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    same = os.getpgid(int(path.name)) == pid and int(path.name) != pid
                    if same and b"submitit.core._submit" in (path / "cmdline").read_bytes().split(b"\0"):
                        os.kill(int(path.name), number)
                except OSError:
                    continue


def _names(ids: list[str]) -> list[str]:
    return [i if "_" in i else f"{i}_0" for i in ids]


def scancel(arguments: list[str]) -> None:
    for name in _names(arguments):
        pid = (STATE / name).read_text().split()[1]
        put(STATE / name, f"CANCELLED {pid}")
    _tell(_names(arguments), signal.SIGTERM)


def preempt(arguments: list[str]) -> None:
    for name in _names(arguments):
        (STATE / f"{name}.requeue").touch()
    _tell(_names(arguments), signal.SIGTERM)


def timeout(arguments: list[str]) -> None:
    _tell(_names(arguments), signal.SIGUSR2)


def scontrol(arguments: list[str]) -> None:
    (STATE / f"{_names(arguments[1:])[0]}.requeue").touch()


if __name__ == "__main__":
    called = Path(sys.argv[0]).name
    if called == Path(__file__).name and sys.argv[1] == "daemon":
        daemon(*sys.argv[2:])
    else:
        {f.__name__: f for f in (sbatch, srun, sacct, scancel, scontrol, squeue)}[called](sys.argv[1:])
