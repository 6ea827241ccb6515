"""`rmoe train`: each wrong request is one line and status 2, and nothing is written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from rmoe.cli import main as cli
from tests.training import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"))


def refused(capsys: pytest.CaptureFixture[str], out: Path, *argv: str) -> str:
    """Run a wrong request; give its line."""
    assert cli.main(["train", "--out", str(out), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert not out.exists()
    return captured.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "hugh"], "--preset is 'hugh'; allowed: medium, pretrain-0.9b"),
        (["--router", "rmeo"], "router is 'rmeo'; allowed: one of smoe"),
        (["--training.learning-rat", "1"], "--training.learning-rat"),
        (["--training.max-steps", "x"], "--training.max-steps"),
        (["--training.max-steps", "0"], "training.max_steps is 0"),
        (["--model.num-experts-per-tok", "9"], "num_experts_per_tok is 9; allowed: 1 to num_experts (8)"),
        (["--router-option", "recurrence.width=0"], "recurrence.width is 0; allowed: a value above 0"),
        (["--model.num-attention-heads", "5"], "head_dim"),
        (["--model.hidden-act", "rleu"], "hidden_act is 'rleu'"),
        (["--plugin", "no_such_module"], "--plugin is 'no_such_module'"),
        (["--training.device", "cuda"], "training.device is 'cuda'"),
        (["--logging.report-to", "pigeon"], "logging.report_to is 'pigeon'"),
        (["--data.max-vocab", "9"], "data.max_vocab is 9; allowed: unset unless data.tokenizer is words"),
        (["--data.min-count=2"], "data.min_count is 2; allowed: unset unless data.tokenizer is words"),
        (["--data.download"], "data.download is True; allowed: unset unless data.split is enwik8"),
        (["--data", ""], "data.path is ''; allowed: a path"),
        (["--branch-of", ""], "--branch-of is ''; allowed: a path"),
    ],
)
def test_wrong_settings(capsys, monkeypatch, tmp_path, text, argv, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert said in refused(capsys, tmp_path / "run", "--data", str(text), *argv)


def test_options_that_are_read_are_not_refused() -> None:
    """Nor a stored configuration that has them: its run resumes."""
    from rmoe.data import DataConfig

    DataConfig(tokenizer="words", max_vocab=9, min_count=2).require_read(["max_vocab", "min_count"])
    DataConfig(split="enwik8", download=True).require_read(["download"])
    DataConfig(path="x", max_vocab=9, min_count=2, download=True).require_read(["path"])
    DataConfig(path="x").require_read(["max_vocab", "min_count", "download"])


def test_wrong_texts(capsys, tmp_path):
    out = tmp_path / "run"
    assert "nowhere.txt" in refused(capsys, out, "--data", str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "empty" in refused(capsys, out, "--data", str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("three words only\n" * 30)
    assert "sequence_length" in refused(capsys, out, "--data", str(tmp_path / "short.txt"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 10_000)[:50])
    assert "cut.txt.gz" in refused(capsys, out, "--data", str(tmp_path / "cut.txt.gz"))


def test_wrong_preset_files(capsys, tmp_path):
    preset = tmp_path / "mine.toml"
    for toml, said in (
        ("[trainig]\n", "trainig is {}"),
        ("router = ", "TOML"),
        ("router = 3\n", "router is 3"),
    ):
        preset.write_text(toml)
        assert said in refused(capsys, tmp_path / "run", "--preset", str(preset))


def test_an_output_folder_that_holds_something(capsys, tmp_path, text):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    for more in ([], ["--resume"], ["--resume", "--preset", "quick"]):
        assert cli.main(["train", "--data", str(text), "--out", str(out), *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert (out / "config.json").read_text() == "{}"
    assert {path.name for path in out.iterdir()} <= {"config.json", "run.lock"}


def test_a_failed_run_is_one_line_and_status_1(capsys, monkeypatch, tmp_path, text):
    from rmoe.training.learner import ModelLearner

    loss = ModelLearner.loss
    monkeypatch.setattr(ModelLearner, "loss", lambda self, *a: loss(self, *a) * float("nan"))
    monkeypatch.delenv("RMOE_DEBUG", raising=False)
    argv = [
        "--model.num-hidden-layers",
        "1",
        "--training.max-steps",
        "20",
        "--training.sequence-length",
        "32",
    ]
    more = [
        "--training.max-skipped-batches",
        "1",
        "--training.batch-size",
        "2",
        "--logging.evaluate-every",
        "99",
    ]
    assert cli.main(["train", "--data", str(text), "--out", str(tmp_path / "run"), *argv, *more]) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if line.startswith("error: ")] == err[-1:]
    assert "the loss or its gradient was not finite in 2 batches" in err[-1]
    assert "saved: checkpoint-2 in" in err[-1]
