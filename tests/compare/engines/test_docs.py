"""The lines of docs/scale.md's grids, as they are written, with fewer steps and a smaller text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rmoe.cli.main import main
from tests.compare.engines.cluster import Cluster
from tests.compare.test_compare import config_of, weights
from tests.test_readme import commands

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
LINES = {
    words[words.index("--out") + 1] if "--out" in words else words[1]: words[1:]
    for line in commands(PAGE)
    if (words := shlex.split(line))[1] in ("compare", "plan")
}
RAY = re.findall(r"^ray start .*$", PAGE.read_text(), re.MULTILINE)
SHORT = ["--training.max-steps", "6", "--training.batch-size", "2", "--training.sequence-length", "32"]
SHORT += ["--training.warmup-steps", "2", "--timing-rounds", "0", "--analysis-tokens", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    config_of(folder)  # its text
    return folder


def run(name: str, place: Path, *more: str, replaced: dict[str, str] | None = None) -> int:
    words = [(replaced or {}).get(word, word) for word in LINES[name]]
    if words[0] == "compare":
        words += [*SHORT, "--data", str(place / "text.txt")]
    return main([*words, *more])


def test_there_is_a_line_for_every_engine():
    assert {"runs/grid", "runs/ray", "runs/fetched", "runs/slurm", "runs/submitit", "plan"} <= LINES.keys()
    assert [("--head" in line) for line in RAY] == [True, False]


def test_local_and_the_plan_from_it(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run("runs/grid", place) == 0
    assert run("plan", place) == 0
    assert re.search(r"^6 runs, \d+ at once on local$", capsys.readouterr().out, re.MULTILINE)


def test_ray_with_the_nodes_as_documented(place, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(place)
    cluster = Cluster.documented(*RAY)
    try:
        address = {"127.0.0.1:6379": cluster.address}
        assert run("runs/ray", place, replaced=address) == 0
        assert run("runs/fetched", place, replaced=address) == 0
    finally:
        cluster.close()
    for key in ("smoe-seed0", "rmoe-seed0"):
        assert weights(place / "runs/ray", key) == weights(place / "runs/fetched", key)


def test_slurm_and_submitit(place, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(place)
    assert run("runs/submitit", place) == 0
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run("runs/slurm", place) == 2  # as written it needs a cluster; test_slurm.py has one
    assert "engine.kind is 'slurm'; allowed: a machine that submits to Slurm" in capsys.readouterr().err
