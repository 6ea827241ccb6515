"""Jobs for engines: plain records, each of which says something about the process it ran in."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from rmoe.errors import RunError, Stopped
from rmoe.records import Record, append_lines


class Environment(Record, frozen=True, kw_only=True):
    """Gives variables of its process, after a while."""

    names: list[str]
    seconds: float = 0.0

    def carry_out(self) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {name: os.environ.get(name) for name in self.names} | {"pid": os.getpid()}


class Where(Record, frozen=True, kw_only=True):
    """Gives the folder that it runs in."""

    def carry_out(self) -> str:
        return os.getcwd()


class Fail(Record, frozen=True, kw_only=True):
    """Fails as a run does."""

    def carry_out(self) -> None:
        raise RunError("the loss is NaN", "nothing", "lower the learning rate")


class Crash(Record, frozen=True, kw_only=True):
    """Kills its own process the first `times`; gives the number of the attempt."""

    attempts: str
    times: int

    def carry_out(self) -> int:
        append_lines(Path(self.attempts), b"x\n")
        attempt = len(Path(self.attempts).read_bytes().split())
        if attempt <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt


class Count(Record, frozen=True, kw_only=True):
    """Counts to `steps` in a file, `seconds` each, and goes on where it was; SIGTERM stops it between two steps."""

    file: str
    steps: int
    seconds: float = 0.05

    def carry_out(self) -> int:
        told: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
        path = Path(self.file)
        while (done := len(path.read_bytes().split()) if path.exists() else 0) < self.steps:
            if told:
                raise Stopped(f"stopped at {done}")
            append_lines(path, f"{done} {os.getpid()} {os.uname().nodename}\n".replace(" ", "-").encode())
            time.sleep(self.seconds)
        return self.steps


class Rank(Record, frozen=True, kw_only=True):
    """Sums the ranks of its processes over gloo."""

    def carry_out(self) -> tuple[int, int]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        try:
            total = torch.tensor(dist.get_rank())
            dist.all_reduce(total)
            return dist.get_world_size(), int(total)
        finally:
            dist.destroy_process_group()


class OneRankFails(Record, frozen=True, kw_only=True):
    """Fails on its second rank, for which the first would wait a minute."""

    def carry_out(self) -> str:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA out of memory")
        time.sleep(60)
        return "value of rank 0"


class RankFiles(Record, frozen=True, kw_only=True):
    """Every rank writes a file; the first gives what it sees of the others'."""

    folder: str

    def carry_out(self) -> int:
        folder, rank = Path(self.folder), os.environ["RANK"]
        folder.mkdir(exist_ok=True)
        (folder / f"rank-{rank}").write_text(rank)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("rank-*"))) < int(os.environ["WORLD_SIZE"]):
            if time.monotonic() > deadline:
                raise RunError("ranks have folders of their own", "nothing", "no")
            time.sleep(0.05)
        return len(list(folder.glob("rank-*")))
