"""The command line's contract: one line per mistake, statuses 0, 1, 2, and no torch where none is needed."""

import os
import subprocess
import sys

import pytest

from rmoe.cli import main as cli
from rmoe.errors import RunError, Stopped


def test_help_and_version_exit_0(capsys):
    assert cli.main([]) == 0
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rmoe ")


def test_unknown_verb_is_one_line_and_exit_2(capsys):
    assert cli.main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: verb is 'trian'; allowed: zoo, train")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            RunError("loss is NaN at step 4", "checkpoint-2", "--resume"),
            1,
            "error: loss is NaN at step 4; saved",
        ),
        (OSError(28, "No space left\non device"), 1, "error: OSError: [Errno 28] No space left on device"),
    ],
)
def test_errors_of_a_verb(monkeypatch, capsys, error, status, said):
    def dispatch(argv):
        raise error

    monkeypatch.setattr(cli, "dispatch", dispatch)
    monkeypatch.delenv("RMOE_DEBUG", raising=False)
    assert cli.main(["train"]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(said)

    monkeypatch.setenv("RMOE_DEBUG", "1")
    assert cli.main(["train"]) == status
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert said in err.splitlines()[-1]


def test_a_run_that_was_stopped_is_no_error(monkeypatch, capsys):
    def dispatch(argv):
        raise Stopped("stopped at step 7 of 20; saved: checkpoint-7; --resume goes on")

    monkeypatch.setattr(cli, "dispatch", dispatch)
    assert cli.main(["train"]) == 0
    assert capsys.readouterr().err == "stopped at step 7 of 20; saved: checkpoint-7; --resume goes on\n"


@pytest.mark.parametrize("arguments", [["--help"], ["zoo"], ["zoo", "--json"], ["zoo", "--help"]])
def test_help_and_zoo_import_no_torch(arguments):
    code = (
        "import sys; from rmoe.cli.main import main; "
        f"status = main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rmoe" in done.stdout


def test_help_ends_on_a_terminal_of_one_column():
    command = [sys.executable, "-m", "rmoe.cli.main", "zoo", "--help"]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {"COLUMNS": "1"}, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"usage: rmoe zoo" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_sign_shows_another(encoding):
    """`zoo` describes routers with signs that these have not."""
    command = [sys.executable, "-m", "rmoe.cli.main", "zoo", "rmoe"]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


def test_no_output_at_all_is_no_failure():
    command = f"{sys.executable} -m rmoe.cli.main --version >&-"
    assert subprocess.run(command, shell=True, capture_output=True, check=False).returncode == 0
