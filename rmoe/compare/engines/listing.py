"""The runs below a folder, those of grids on any engine too: what is queued, and what nothing carries out any more.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from rmoe.compare.engines.journal import JOURNAL, Entry, read_journal
from rmoe.errors import RequestError
from rmoe.training.config import RunConfig
from rmoe.training.listing import RunStatus, find_runs, folders_below, seconds_left
from rmoe.training.run_folder import CONFIG, LOCK, read_run

COMPARISON = "comparison.json"
QUIET_SECONDS = 600.0  # without a row, after which a run on another machine counts as gone


def grid_runs(root: Path, depth: int = 4) -> list[RunStatus]:
    """`find_runs`, with what the journals of grids know.

    Raises:
        RequestError: there is no such folder.
    """
    found = {Path(run.folder).resolve(): run for run in find_runs(root, depth)}
    for grid in folders_below(root, depth, lambda folder: (folder / CONFIG).is_file()):
        if not (grid / JOURNAL).is_file():
            continue
        entries = read_journal(grid)
        queue = slurm_queue() if any(entry.engine == "slurm" for entry in entries.values()) else None
        config = _config_of(grid)
        for name, entry in entries.items():
            places = [(grid / part / name).resolve() for part in ("runs", "branches")]
            folder = next((place for place in places if place in found), places[0])
            status = found.get(folder) or _without_folder(config, grid / "runs" / name)
            if status is not None:
                found[folder] = _seen_by(status, entry, queue)
    return sorted(found.values(), key=lambda run: run.folder)


def _config_of(grid: Path) -> RunConfig | None:
    """Of a comparison's runs, but for router and seed; None for another kind of grid."""
    try:
        return RunConfig.from_dict(msgspec.json.decode((grid / COMPARISON).read_bytes())["config"])
    except (OSError, msgspec.DecodeError, RequestError, KeyError, TypeError):
        return None


def _without_folder(config: RunConfig | None, folder: Path) -> RunStatus | None:
    """A run that has not begun; None for a job that is no run."""
    router, is_run, rest = folder.name.rpartition("-seed")
    if config is None or not is_run:
        return None
    return RunStatus(
        folder=str(folder),
        router=router,
        seed=int(rest.partition("-")[0]) if rest.partition("-")[0].isdigit() else config.training.seed,
        state="not begun",
        step=0,
        steps=config.training.max_steps,
    )


def _seen_by(status: RunStatus, entry: Entry, queue: frozenset[str] | None) -> RunStatus:
    """The status with what its engine's journal adds: a lock says nothing of another machine's processes."""
    if status.state in ("finished", "running") or entry.state not in ("queued", "lost"):
        return status
    if _is_elsewhere(Path(status.folder)) and status.quiet_s is not None and status.quiet_s < QUIET_SECONDS:
        config = RunConfig.from_dict(read_run(Path(status.folder)).config)
        left = seconds_left(config, status.step, status.tokens_per_s)
        return msgspec.structs.replace(status, state="running", seconds_left=left)
    if entry.state == "queued" and _is_waited_for(entry, queue):
        return msgspec.structs.replace(status, state="queued")
    return msgspec.structs.replace(status, state="lost")


def _is_elsewhere(folder: Path) -> bool:
    """Whether the last process that wrote in a run's folder was another machine's."""
    try:
        holder = (folder / LOCK).read_text(errors="replace").strip()
    except OSError:
        return False
    return bool(holder) and not holder.endswith(f" on {os.uname().nodename}")


def _is_waited_for(entry: Entry, queue: frozenset[str] | None) -> bool:
    """Whether somebody still carries a queued job out."""
    if entry.engine == "slurm":
        return queue is None or entry.id in queue
    pid, _, host = (entry.driver or "").partition(" ")
    return host != os.uname().nodename or Path(f"/proc/{pid}").exists()


def slurm_queue() -> frozenset[str] | None:
    """Jobs that Slurm has waiting or running; None where it cannot be asked."""
    if shutil.which("squeue") is None:
        return None
    answer = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"], capture_output=True, text=True, check=False
    )
    return frozenset(answer.stdout.split()) if answer.returncode == 0 else None
