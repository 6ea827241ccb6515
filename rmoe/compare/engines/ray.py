"""A Ray cluster: one task for each job, which starts a child process to do it.

A lost machine's jobs start again elsewhere (`max_retries`), from their last checkpoint in the shared folder. When the
comparison ends, or dies, the bell does too: every task then lets its child save.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmoe.compare.engines.config import EngineConfig
from rmoe.compare.engines.engine import Answer, Engine, Job, Wants
from rmoe.compare.engines.journal import note, state_of
from rmoe.compare.engines.process import Process, threads_of
from rmoe.compare.engines.shared import sees, token_in
from rmoe.errors import RequestError, one_line

SECONDS_TO_ANSWER = 10.0
SECONDS_TO_SAVE = 120.0
SECONDS_TO_LOOK = 60.0  # for the shared folder's token
OBJECT_STORE_BYTES = 200 * 2**20  # of a cluster of our own: answers are small
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


def require_answer(address: str) -> None:
    """Check that a gRPC server, as Ray's is, answers there. `ray.init` would wait for minutes.

    Raises:
        RequestError: none does within ten seconds.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER) as connection:
            connection.sendall(_PREFACE)
            if connection.recv(9)[3:4] == bytes([_SETTINGS]):
                return
            said = "what answers there is no Ray"
    except (OSError, ValueError) as error:
        said = str(error)
    raise RequestError("engine.address", address, f"HOST:PORT of a Ray cluster that runs ({said})")


def _asked(wants: Wants) -> dict[str, tuple[str, float, int]]:
    """Ray's name of a resource -> (ours, how much, its unit)."""
    memory = {} if wants.memory_gib is None else {"memory": ("memory_gib", wants.memory_gib * 2**30, 2**30)}
    return {"CPU": ("cpus", wants.cpus, 1), "GPU": ("gpus", wants.gpus, 1), **memory}


def _has_room(node: Mapping[str, Any], wants: Wants) -> bool:
    return all(node["Resources"].get(kind, 0.0) >= value for kind, (_, value, _) in _asked(wants).items())


def _carried(
    job: Job,
    wants: Wants,
    threads: int,
    log: Path,
    setup: tuple[str, ...],
    retries: int,
    bell: Any,
    folder: Path,
) -> Answer:
    """In a Ray worker: one job, in a child process, which runs in the caller's folder where there is such a one."""
    import ray

    # Ray's own is where `ray start` was called: relative paths of a job would lead elsewhere.
    process = Process(threads_of(threads), log, setup, folder if folder.is_dir() else None)

    def listen() -> None:
        try:
            ray.get(bell.wait.remote())
        except Exception:  # it died with the comparison
            process.stop()
            return
        process.stop()

    threading.Thread(target=listen, daemon=True).start()
    try:
        return process.do(job, wants, retries)
    finally:
        process.close()


class Bell:
    """Rung when the comparison wants its jobs to save and end."""

    def __init__(self) -> None:
        import asyncio

        self._rung = asyncio.Event()

    async def wait(self) -> None:
        await self._rung.wait()

    async def ring(self) -> None:
        self._rung.set()


class RayEngine(Engine):
    """A cluster that runs, or one of this machine for as long as the engine.

    Args:
        config: address, retries, set-up.
        out: the grid's folder.
        wants: of its runs; checked against the nodes at once.
        threads: of each process.

    Raises:
        RequestError: Ray is not installed or does not answer, no node has what a run wants, or one does not see `out`.
    """

    def __init__(self, config: EngineConfig, out: Path, wants: Wants, threads: int) -> None:
        try:
            import ray
        except ImportError:
            raise RequestError("engine.kind", "ray", "local, or `pip install rmoe[ray]`") from None
        self.ray, self.config, self.out, self.threads = ray, config, out.resolve(), threads
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if config.address is not None:
            require_answer(config.address)
            ray.init(address=config.address, **quiet)
        else:  # "local": not the cluster that RAY_ADDRESS names
            ray.init("local", object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
        try:
            node = self._node(config.node)
            self._require_room(wants, self._nodes() if node is None else [node])
            self._require_shared()
            self.at_once = f"on {len(self._nodes())} Ray node(s)"
        except RequestError:
            ray.shutdown()
            raise
        # On the driver's own node: the loss of another one must not ring it.
        here = next(n for n in self._nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
        bell = ray.remote(Bell).options(
            num_cpus=0, max_concurrency=10_000, scheduling_strategy=self._on(here)
        )
        self._bell: Any = bell.remote()
        self._running: dict[Any, str] = {}

    def _nodes(self) -> list[Mapping[str, Any]]:
        """As far as the cluster knows now: of one that died it learns within half a minute."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _names(self, node: Mapping[str, Any]) -> list[str]:
        return [node["NodeName"], node["NodeManagerHostname"], node["NodeManagerAddress"], node["NodeID"]]

    def _node(self, name: str | None) -> Mapping[str, Any] | None:
        if name is None:
            return None
        for node in self._nodes():
            if name in self._names(node):
                return node
        allowed = ", ".join(sorted(node["NodeName"] for node in self._nodes()))
        raise RequestError("engine.node", name, f"a node of the cluster: {allowed}")

    def _require_room(self, wants: Wants, nodes: Sequence[Mapping[str, Any]]) -> None:
        asked = _asked(wants)
        for kind, (field, value, unit) in asked.items():
            most = max(node["Resources"].get(kind, 0.0) for node in nodes)
            if value > most:
                where = "on one node" if self.config.node is None else f"on {self.config.node}"
                raise RequestError(
                    f"engine.{field}", getattr(wants, field), f"at most {most / unit:g} {where}"
                )
        if not any(_has_room(node, wants) for node in nodes):
            said = ", ".join(f"{field} {value / unit:g}" for field, value, unit in asked.values())
            raise RequestError("engine", said, "what one node has at once")

    def _require_shared(self) -> None:
        """A token of this machine must be read on every node."""
        if self.config.fetch != "no":
            return
        folder = self.out if self.config.shared is None else Path(self.config.shared).resolve()
        if not self.out.is_relative_to(folder):
            raise RequestError("engine.shared", str(folder), f"a folder with --out ({self.out}) in it")
        with token_in(folder) as token:
            look = self.ray.remote(sees)
            asked = [
                (node, look.options(num_cpus=0, scheduling_strategy=self._on(node)).remote(*token))
                for node in self._nodes()
            ]
            for node, reference in asked:
                name = node["NodeName"]
                try:
                    machine, seen = self.ray.get(reference, timeout=SECONDS_TO_LOOK)
                except self.ray.exceptions.RayError:
                    if node["NodeID"] not in {other["NodeID"] for other in self._nodes()}:
                        continue  # it has died since
                    allowed = f"a cluster whose nodes answer: {name} does not"
                    raise RequestError("engine.address", self.config.address, allowed) from None
                if not seen:
                    allowed = (
                        f"one that every node sees: {name} ({machine}) does not; or engine.fetch without it"
                    )
                    raise RequestError("engine.shared", str(folder), allowed)

    def _on(self, node: Mapping[str, Any]) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)

    def _options(self, wants: Wants) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_cpus": wants.cpus,
            "num_gpus": wants.gpus,
            "max_retries": self.config.retries,
        }
        if wants.memory_gib:
            options["memory"] = int(wants.memory_gib * 2**30)
        node = self._node(wants.node)
        if wants.alone:
            node = node or next(n for n in self._nodes() if _has_room(n, wants))
            options["num_cpus"] = node["Resources"]["CPU"]
        return options if node is None else options | {"scheduling_strategy": self._on(node)}

    def answers(self, jobs: Mapping[str, Job], wants: Wants) -> Iterator[tuple[str, Answer]]:
        carried = self.ray.remote(_carried).options(**self._options(wants))
        left = list(jobs.items())
        while left or self._running:
            while left and (self.config.at_once is None or len(self._running) < self.config.at_once):
                name, job = left.pop(0)
                arguments = (job, wants, self.threads, self.out / "logs" / f"{name}.log")
                rest = (self.config.setup, self.config.retries, self._bell, Path.cwd())
                reference = carried.remote(*arguments, *rest)
                self._running[reference] = name
                note(self.out, name, "queued", "ray")
            done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=0.5)
            for reference in done:
                name, answer = self._running.pop(reference), self._answer_of(reference)
                note(self.out, name, state_of(answer), "ray")
                yield name, answer

    def _answer_of(self, reference: Any) -> Answer:
        try:
            answer: Answer = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return Answer(error=one_line(str(error).strip().splitlines()[-1]))
        except self.ray.exceptions.RayError as error:  # its worker or its node died, once too often
            return Answer(error=one_line(f"{type(error).__name__}: {error}")[:300], lost=True)
        return answer

    def close(self, interrupted: bool) -> None:
        if interrupted:
            print("stopping: what is being trained saves a checkpoint first ...", file=sys.stderr, flush=True)
        try:
            self.ray.get(self._bell.ring.remote(), timeout=SECONDS_TO_ANSWER)
            if self._running:
                references = list(self._running)  # what still waits for room ends as soon as it starts
                self.ray.wait(references, num_returns=len(references), timeout=SECONDS_TO_SAVE)
        except self.ray.exceptions.RayError:
            pass  # the cluster is gone
        self.ray.shutdown()
