"""Runs that were moved, or are resumed from another working folder: content decides, not paths."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rmoe.cli.main import main
from rmoe.data import DataConfig
from rmoe.data.encode import byte_tokenizer
from rmoe.training.config import _found_again
from rmoe.training.run import read_result
from tests.training import tiny

OPTIONS = [
    "--preset=quick", "--model.hidden-size=32", "--model.num-hidden-layers=2", "--training.max-steps=4",
    "--training.sequence-length=32", "--training.batch-size=2", "--training.threads=1", "--training.device=cpu",
    "--checkpoints.every=2", "--logging.final-blocks=2", "--logging.evaluate-blocks=2",
]  # fmt: skip
PLUGIN = "from rmoe.routing.zoo import ZOO\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, a tokenizer, a plugin and a run that has lost its last checkpoint and its model."""
    here = tmp_path / "here"
    (here / "texts").mkdir(parents=True)
    tiny.text(here / "texts")
    byte_tokenizer().save_pretrained(here / "tokenizer")
    (here / "plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(here)
    files = ["--data=texts/text.txt", "--data.tokenizer=tokenizer", "--plugin=plugin.py"]
    assert main(["train", "--out=runs/a", *files, *OPTIONS]) == 0
    shutil.copytree("runs/a/model", "whole")
    unfinish(Path("runs/a"))
    return here


def unfinish(run: Path) -> None:
    (run / "result.json").unlink()
    for part in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(run / part)


def another_folder(project: Path) -> tuple[Path, Path]:
    """Another working folder, with another text of the same name."""
    other = project.parent / "other"
    (other / "texts").mkdir(parents=True)
    (other / "texts" / "text.txt").write_text("another text\n" * 500)
    return other, project / "runs" / "a"


def as_a_whole(project: Path) -> tuple[Path, Path]:
    return project.parent, project.rename(project.parent / "there") / "runs" / "a"


def the_run_alone(project: Path) -> tuple[Path, Path]:
    return project.parent, (project / "runs" / "a").rename(project.parent / "moved")


@pytest.mark.parametrize("move", [another_folder, as_a_whole, the_run_alone])
def test_a_run_resumes_bit_for_bit(
    move: Callable[[Path], tuple[Path, Path]],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, run = move(project)
    base = run.parent.parent if move is not the_run_alone else project
    monkeypatch.chdir(here)
    assert main(["train", "--out", str(run), "--resume", f"--plugin={base / 'plugin.py'}"]) == 0
    assert "at step 3 of 4" in capsys.readouterr().err
    assert tiny.weights(run) == tiny.sha256(base / "whole" / "model.safetensors")
    assert read_result(run).model == str(run / "model")


def test_another_text_or_plugin_is_another_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, run = another_folder(project)
    monkeypatch.chdir(other)
    resume = ["train", "--out", str(run), "--resume"]
    plugin = f"--plugin={project / 'plugin.py'}"
    assert main([*resume, plugin, "--data=texts/text.txt"]) == 2
    assert "data_sha256" in capsys.readouterr().err
    assert main([*resume, plugin, "--data.tokenizer=words"]) == 2
    assert "data.tokenizer" in capsys.readouterr().err
    (other / "plugin.py").write_text(PLUGIN + "# changed\n")
    assert main([*resume, "--plugin=plugin.py"]) == 2
    assert "plugin" in capsys.readouterr().err


def test_a_text_that_is_nowhere_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (project / "texts" / "text.txt").rename(project / "renamed.txt")
    resume = ["train", "--out", "runs/a", "--resume", "--plugin=plugin.py"]
    assert main(resume) == 2
    assert "data.path is 'texts/text.txt'" in capsys.readouterr().err
    assert main([*resume, f"--data={text}"]) == 0


def test_a_folder_that_is_called_as_a_tokenizer_of_the_hub_is_not_taken_for_it(tmp_path: Path) -> None:
    out = tmp_path / "gpt2" / "runs" / "a"
    out.mkdir(parents=True)
    text = tiny.text(tmp_path)
    record = SimpleNamespace(started_in=str(tmp_path / "elsewhere"), data_sha256="0" * 64)
    found = _found_again(DataConfig(path=str(text), tokenizer="gpt2"), out, record)
    assert found.tokenizer == "gpt2"
