"""The launch lines of docs/scale.md run as they are written, with fewer steps; sharded runs resume bit for bit."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rmoe.training.metrics import read_metrics
from tests.training import tiny
from tests.training.test_kill import SETTINGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LINES = re.findall(r"^torchrun .*$", (ROOT / "docs" / "scale.md").read_text(), re.MULTILINE)
SHORT = [*SETTINGS, "--training.max-steps", "10", "--model.hidden-dropout", "0", "--router", "smoe-global"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


def launch(line: str, *more: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run a documented line with this interpreter's torchrun and any free port."""
    program, *arguments = shlex.split(line.replace("--nproc-per-node 2", f"--nproc-per-node {ranks}"))
    assert program == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


def train(line: str, text: Path, out: Path, *more: str, ranks: int = 2) -> Path:
    line = re.sub(r"--out \S+", f"--out {out}", line)
    settings = [] if "--resume" in more else without("--router-option", SHORT)
    done = launch(line, "--data", str(text), *settings, *more, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return out


def without(option: str, arguments: list[str]) -> list[str]:
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    return [token for pair in pairs if pair[0] != option for token in pair]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


def line_with(words: str) -> str:
    (found,) = [line for line in LINES if line.partition("quick")[2].startswith(f" {words}--out")]
    return found


def test_there_is_a_line_for_every_layout():
    assert len(LINES) == 5


@pytest.mark.parametrize("script", ["tensor", "pipeline"])
def test_scripts(script):
    (line,) = [line for line in LINES if f"{script}_parallel.py" in line]
    done = launch(line)
    assert done.returncode == 0, done.stderr
    values = [float(value) for value in re.findall(r"step \d+  loss ([0-9.]+)", done.stdout)]
    assert len(values) == 5
    assert values[-1] < values[0]


@pytest.fixture(scope="module")
def one(text, tmp_path_factory) -> Path:
    return train(line_with(""), text, tmp_path_factory.mktemp("one") / "run", ranks=1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp(text, one, tmp_path, ranks):
    out = train(line_with(""), text, tmp_path / "run", ranks=ranks)
    assert losses(out) == pytest.approx(losses(one), abs=1e-6)


@pytest.mark.parametrize("words", ["--parallel.fsdp 2 ", "--parallel.fsdp 2 --parallel.expert 2 "])
def test_sharded_training_equals_one_process_and_resumes(text, one, tmp_path, words):
    line = line_with(words)
    out = train(line, text, tmp_path / "run")
    assert losses(out) == pytest.approx(losses(one), abs=1e-6)
    assert not list(out.rglob("*.bin"))
    assert not list(out.rglob(".metadata"))

    for name, ranks in (("again", 2), ("alone", 1)):
        other = tmp_path / name
        shutil.copytree(out, other)
        for path in ("model", "checkpoints/checkpoint-10"):
            shutil.rmtree(other / path)
        (other / "result.json").unlink()
        resumed = line if ranks == 2 else line_with("")
        train(
            resumed.replace(" --preset quick", ""),
            text,
            other,
            "--resume",
            *(("--parallel.fsdp", "1", "--parallel.expert", "1") if ranks == 1 else ()),
            ranks=ranks,
        )
        assert losses(other) == pytest.approx(losses(one), abs=1e-6)
        if ranks == 2:
            assert tiny.weights(other) == tiny.weights(out)
