"""A Ray cluster of several nodes on this machine's loopback; ended by process id, always."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

# Before Ray is imported: every node and driver of these clusters shares a token of its own, whatever the user's is.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
os.environ["RAY_health_check_period_ms"] = "1000"  # noqa: SIM112  a killed node is known after 5 s
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's 15 gets nothing on a busy machine

RAY = str(Path(sys.executable).with_name("ray"))
STORE = str(100 * 2**20)
HEAD = "ray start --head --port=6379 --include-dashboard=false"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Processes below one, nearest first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found[1:]


class Cluster:
    """A head and further nodes.

    Args:
        cpus: of each node.
        gpus: of each node, as Ray counts them; none are there.
    """

    def __init__(self, cpus: int = 1, gpus: int = 0, head: str = HEAD) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        # A page's own lines say these; ours say them for every node.
        self.options = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        self.options = self.options if head == HEAD else []
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.nodes: dict[str, subprocess.Popen] = {}
        self._start("head", *self._words(head), f"--temp-dir={self.folder}")

    @classmethod
    def documented(cls, head: str, node: str) -> Cluster:
        """As two lines of a page say, on a port that is free."""
        found = cls(head=head)
        found._start("second", *found._words(node))
        return found

    def _words(self, line: str) -> list[str]:
        """What follows `ray start`, with this cluster's port."""
        port = self.address.rpartition(":")[2]
        return shlex.split(line.replace("127.0.0.1:6379", self.address).replace("=6379", f"={port}"))[2:]

    def add(self, name: str, before: str = "") -> None:
        """A further node; `before` is a shell line that comes first, in a mount namespace of its own."""
        self._start(name, f"--address={self.address}", before=before)

    def _start(self, name: str, *options: str, before: str = "") -> None:
        command = [RAY, "start", "--block", f"--node-name={name}", f"--object-store-memory={STORE}"]
        command += ["--disable-usage-stats", *self.options, *options]
        if before:
            command = ["unshare", "--mount", "bash", "-c", f'{before} && exec "$@"', "node", *command]
        log = open(self.folder / f"{name}.out", "wb")  # noqa: SIM115
        environment = {**os.environ, "CLUSTER_NODE": name}  # a job says where it ran
        self.nodes[name] = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while b"Ray runtime started" not in (self.folder / f"{name}.out").read_bytes():
            assert self.nodes[name].poll() is None, (self.folder / f"{name}.out").read_text()
            assert time.monotonic() < deadline, "ray start takes too long"
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """kill -9 of everything of a node, the runs of its workers too."""
        self._end(self.nodes.pop(name).pid)

    def workers(self) -> list[int]:
        """Ray's worker processes that carry out a task now."""
        found = []
        for node in self.nodes.values():
            for pid in descendants(node.pid):
                try:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if line.startswith(b"ray::_carried"):
                    found.append(pid)
        return found

    @staticmethod
    def _end(pid: int) -> None:
        for one in [pid, *descendants(pid)]:
            try:
                os.kill(one, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for node in self.nodes.values():
            self._end(node.pid)
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
