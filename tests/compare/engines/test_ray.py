"""The ray engine on a real cluster of two nodes on this machine's loopback."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.compare.engines.cluster import Cluster, descendants  # first: it sets Ray's environment

pytest.importorskip("ray")

from rmoe.cli.main import main
from rmoe.compare.engines import EngineConfig, Wants
from rmoe.compare.engines.ray import RayEngine, require_answer
from rmoe.errors import RequestError
from tests.compare.engines.jobs import Count, Crash, Environment, Fail, Where

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cluster():
    found = Cluster(cpus=1, gpus=1)
    try:
        found.add("second")
        yield found
    finally:
        found.close()


def on(cluster: Cluster, out: Path, **options: object) -> RayEngine:
    config = EngineConfig(kind="ray", address=cluster.address, **options)
    return RayEngine(config, out, Wants(), threads=1)


@pytest.mark.slow
def test_jobs_run_on_both_nodes_each_with_its_gpu(cluster, tmp_path):
    with on(cluster, tmp_path) as engine:
        assert engine.at_once == "on 2 Ray node(s)"
        job = Environment(names=["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CLUSTER_NODE"], seconds=1.0)
        jobs = {f"e{n}": job for n in range(4)} | {"fail": Fail()}
        jobs["crash"] = Crash(attempts=str(tmp_path / "attempts"), times=2)
        answers = dict(engine.answers(jobs, Wants(gpus=1)))
        assert answers["fail"].error.startswith("the loss is NaN; saved: nothing")
        assert answers["crash"].value == 3
        seen = [answers[f"e{n}"].value for n in range(4)]
        assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {"0"}
        assert {one["OMP_NUM_THREADS"] for one in seen} == {"1"}
        assert len({one["pid"] for one in seen}) == 4  # a process each
        assert {one["CLUSTER_NODE"] for one in seen} == {"head", "second"}
        (alone,) = dict(engine.answers({"t": job}, Wants(node="second", alone=True))).values()
        (beside,) = dict(engine.answers({"t": job}, Wants(node="head", alone=True))).values()
        assert (alone.value["CLUSTER_NODE"], beside.value["CLUSTER_NODE"]) == ("second", "head")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "wants", "said"),
    [
        ({}, Wants(cpus=3), "engine.cpus is 3; allowed: at most 1 on one node"),
        ({}, Wants(gpus=2), "engine.gpus is 2; allowed: at most 1 on one node"),
        ({}, Wants(memory_gib=1e5), "engine.memory_gib is 100000.0; allowed: at most"),
        ({"node": "third"}, Wants(), "engine.node is 'third'; allowed: a node of the cluster: head, second"),
        ({"shared": "/usr"}, Wants(), "engine.shared is '/usr'; allowed: a folder with --out"),
    ],
)
def test_what_the_cluster_has_not_is_one_line(options, wants, said, cluster, tmp_path):
    config = EngineConfig(kind="ray", address=cluster.address, **options)
    with pytest.raises(RequestError, match=re.escape(said)):
        RayEngine(config, tmp_path / "out", wants, threads=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_leaving_early_lets_what_runs_save(cluster, tmp_path):
    file = tmp_path / "count"
    with on(cluster, tmp_path) as engine:
        jobs = {name: Count(file=str(tmp_path / name), steps=10_000) for name in ("a", "b", "c")}
        answers = engine.answers({"quick": Environment(names=[])} | jobs, Wants())
        assert next(answers)[0] == "quick"
        deadline = time.monotonic() + 30
        while not (tmp_path / "a").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        started = time.monotonic()
    assert time.monotonic() - started < 30
    before = (tmp_path / "a").read_bytes()
    time.sleep(0.3)
    assert (tmp_path / "a").read_bytes() == before
    assert not file.exists()


def _count(out: Path) -> list[list[str]]:
    return [line.split("-") for line in out.read_text().split()]


@pytest.mark.slow
def test_a_lost_node_s_job_starts_again_elsewhere_and_resumes(cluster, tmp_path):
    cluster.add("third")
    file = tmp_path / "count"
    with on(cluster, tmp_path) as engine:
        answers = engine.answers({"0": Count(file=str(file), steps=200)}, Wants())
        deadline = time.monotonic() + 60
        done: list = []
        thread = threading.Thread(target=lambda: done.extend(answers))
        thread.start()
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int(_count(file)[0][1])
        name = next(n for n, node in cluster.nodes.items() if pid in descendants(node.pid))
        if name == "head":
            pytest.skip("ray placed it on the head, which is the cluster")
        cluster.kill(name)
        thread.join(90)
    assert done[0][1].value == 200
    lines = _count(file)
    assert [int(line[0]) for line in lines] == list(range(200))
    assert len({line[1] for line in lines}) == 2


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process(cluster, tmp_path):
    file = tmp_path / "count"
    code = (
        "from pathlib import Path; from rmoe.compare.engines import *;"
        "from rmoe.compare.engines.ray import RayEngine; from tests.compare.engines.jobs import Count;"
        f"config = EngineConfig(kind='ray', address={cluster.address!r});"
        f"engine = RayEngine(config, Path({str(tmp_path)!r}), Wants(), 1);"
        f"list(engine.answers({{'0': Count(file={str(file)!r}, steps=10_000)}}, Wants()))"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    pid = int(_count(file)[0][1])
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_folder_that_is_not_shared(cluster, tmp_path):
    shown = subprocess.run(["unshare", "--mount", "true"], check=False)
    if shown.returncode:
        pytest.skip("no mount namespaces here")
    cluster.add("apart", before=f"mount -t tmpfs none {tmp_path}")
    try:
        with pytest.raises(RequestError, match="allowed: one that every node sees: apart"):
            on(cluster, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    finally:
        cluster.kill("apart")


@pytest.mark.slow
def test_jobs_run_in_the_folder_of_who_asks(cluster, tmp_path, monkeypatch):
    """Not in that of `ray start`: relative paths of a job would lead there."""
    monkeypatch.chdir(tmp_path)
    with on(cluster, tmp_path) as engine:
        (answer,) = dict(engine.answers({"w": Where()}, Wants())).values()
    assert answer.value == str(tmp_path)


@pytest.mark.slow
def test_without_an_address_the_cluster_is_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with RayEngine(EngineConfig(kind="ray"), tmp_path / "out", Wants(), threads=1) as engine:
        (answer,) = dict(engine.answers({"w": Where()}, Wants())).values()
    assert answer.error is None


def test_an_address_that_does_not_answer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("rmoe.compare.engines.ray.SECONDS_TO_ANSWER", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RequestError, match=r"HOST:PORT of a Ray cluster that runs \(timed out\)"):
            require_answer(address)
    for wrong in (address, "nowhere", "127.0.0.1:x"):
        with pytest.raises(RequestError, match="HOST:PORT of a Ray cluster"):
            require_answer(wrong)
    (tmp_path / "text.txt").write_text("".join(f"line {i * 7919 % 101}\n" for i in range(3000)))
    monkeypatch.chdir(tmp_path)
    asked = [
        "--routers",
        "smoe",
        "--data",
        "text.txt",
        "--engine",
        "ray",
        "--engine.address",
        address,
        "--out",
        "out",
    ]
    assert main(["compare", *asked]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=re.escape("local, or `pip install rmoe[ray]`")):
        RayEngine(EngineConfig(kind="ray"), tmp_path, Wants(), threads=1)


def _node(name: str, **resources: float) -> dict[str, object]:
    names = dict.fromkeys(("NodeID", "NodeName", "NodeManagerHostname", "NodeManagerAddress"), name * 56)
    return names | {"Alive": True, "Resources": resources}


def _engine_on(*nodes: dict[str, object], **options: object) -> RayEngine:
    engine = RayEngine.__new__(RayEngine)
    engine.config = EngineConfig(kind="ray", **options)
    engine.ray = SimpleNamespace(nodes=lambda: list(nodes))
    return engine


def test_routers_are_timed_on_a_node_that_has_what_a_run_wants():
    """Not on a head node without CPUs (`ray start --num-cpus=0`), nor on a small one."""
    wants = Wants(cpus=8, memory_gib=32, alone=True)
    for head in (_node("a", memory=1e9), _node("a", CPU=1.0, memory=4e9)):
        options = _engine_on(head, _node("b", CPU=16.0, memory=64e9))._options(wants)
        assert options["num_cpus"] == 16.0
        assert options["scheduling_strategy"].node_id == "b" * 56


def test_a_node_to_time_on_that_is_too_small_is_refused_at_once():
    nodes = _node("a", CPU=4.0), _node("b", CPU=16.0, GPU=8.0)
    engine = _engine_on(*nodes, node="a" * 56)
    with pytest.raises(RequestError, match=r"engine\.gpus is 1; allowed: at most 0 on aaa"):
        engine._require_room(Wants(gpus=1), [nodes[0]])
