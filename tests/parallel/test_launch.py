"""The launch lines of docs/scale.md run as they are written, with fewer steps, and resume bit for bit."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rmoe.cli.main import main
from rmoe.training.metrics import read_metrics
from tests.torchrun import torchrun
from tests.training import tiny
from tests.training.test_kill import SETTINGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LINES = re.findall(r"^torchrun .*$", (ROOT / "docs" / "scale.md").read_text(), re.MULTILINE)
SHORT = [*SETTINGS, "--training.max-steps", "10"]
PLAIN = ["--model.hidden-dropout", "0"]
GLOBAL = [*PLAIN, "--router", "smoe-global"]
"""Its losses are over the global batch, here one micro-batch of each process: they do not depend on how that is cut."""
RECURRENT = ["--router", "rmoe", "--router-option", "recurrence.width=16", "--training.micro-batch-size", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


def launch(line: str, *more: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run a documented line with this interpreter's torchrun and any free port."""
    program, *arguments = shlex.split(line.replace("--nproc-per-node 2", f"--nproc-per-node {ranks}"))
    assert program == "torchrun"
    assert arguments[:2] == ["--nproc-per-node", str(ranks)]
    return torchrun(*arguments[2:], *more, ranks=ranks)


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


@pytest.fixture
def same_losses(note, request) -> Callable[[Path, Path], None]:
    def check(out: Path, one: Path) -> None:
        pairs = zip(losses(out), losses(one), strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        note(kind=f"losses: {request.node.name}", difference=difference)
        assert difference <= 1e-6

    return check


def line_with(words: str) -> str:
    (found,) = [line for line in LINES if line.partition("quick")[2].startswith(f" {words}--out")]
    return found


def test_there_is_a_line_for_every_layout():
    assert len(LINES) == 7


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
    return train(line_with(""), text, tmp_path_factory.mktemp("one") / "run", *GLOBAL, ranks=1)


@pytest.fixture(scope="module")
def one_recurrent(text, tmp_path_factory) -> Path:
    return train(line_with(""), text, tmp_path_factory.mktemp("one") / "run", *RECURRENT, *PLAIN, ranks=1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp(text, one, same_losses, tmp_path, ranks):
    out = train(line_with(""), text, tmp_path / "run", *GLOBAL, ranks=ranks)
    same_losses(out, one)


@pytest.mark.parametrize("words", ["--parallel.fsdp 2 ", "--parallel.fsdp 2 --parallel.expert 2 "])
def test_sharded_training_equals_one_process(text, one, same_losses, tmp_path, words):
    out = train(line_with(words), text, tmp_path / "run", *GLOBAL)
    same_losses(out, one)
    assert not list(out.rglob("*.bin"))
    assert not list(out.rglob(".metadata"))


@pytest.mark.parametrize("words", ["--parallel.tensor 2 ", "--parallel.pipeline 2 "])
def test_cut_models_equal_one_process(text, one_recurrent, same_losses, tmp_path, words):
    """They see the micro-batches that one process sees, so a loss over each of those is the same too."""
    out = train(line_with(words), text, tmp_path / "run", *RECURRENT, *PLAIN)
    same_losses(out, one_recurrent)


def test_fsdp_and_tensor_parallelism_together(text, one, same_losses, tmp_path):
    line = line_with("--parallel.fsdp 2 ").replace(
        "--parallel.fsdp 2", "--parallel.fsdp 2 --parallel.tensor 2"
    )
    out = train(line, text, tmp_path / "run", *GLOBAL, ranks=4)
    same_losses(out, one)


LAYOUTS = [
    "--parallel.fsdp 2 ",
    "--parallel.fsdp 2 --parallel.expert 2 ",
    "--parallel.tensor 2 ",
    "--parallel.pipeline 2 ",
]


@pytest.mark.parametrize("words", LAYOUTS)
def test_resume(text, tmp_path, words):
    """Dropout on. DDP's is in tests/training/test_ranks.py."""
    line = line_with(words)
    whole = train(line, text, tmp_path / "whole", *RECURRENT)
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    for path in ("model", "checkpoints/checkpoint-10"):
        shutil.rmtree(out / path)
    (out / "result.json").unlink()
    train(line.replace(" --preset quick", ""), text, out, "--resume")
    assert losses(out) == losses(whole)
    assert tiny.weights(out) == tiny.weights(whole)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parallel.pipeline", "2", "--parallel.fsdp", "2"], "parallel.pipeline is 2"),
        (["--parallel.fsdp", "3"], "the number of processes (1)"),
        (["--parallel.tensor", "3"], "parallel.tensor is 3"),
        (["--parallel.pipeline", "2", "--router", "hash"], "router.kind is 'hash'"),
        (["--parallel.pipeline", "2"], "the number of processes (1)"),
        (["--parallel.expert", "3"], "parallel.expert is 3"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(text, tmp_path, capsys, options, said):
    out = tmp_path / "run"
    settings = without("--router-option", SHORT) if "--router" in options else SHORT
    assert main(["train", "--data", str(text), "--out", str(out), *settings, *options]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not out.exists()
