"""The two errors: one line each, their exit status, and what they carry."""

import pytest

from rmoe.errors import RequestError, RunError


def test_request_error() -> None:
    error = RequestError("gate.k", 9, "1 to num_experts (8)")
    assert str(error) == "gate.k is 9; allowed: 1 to num_experts (8)"
    assert (error.field, error.value, error.allowed) == ("gate.k", 9, "1 to num_experts (8)")
    assert error.exit_status == 2
    assert isinstance(error, ValueError)


def test_run_error() -> None:
    error = RunError("loss is NaN at step 40", "checkpoint-30", "--resume")
    assert str(error) == "loss is NaN at step 40; saved: checkpoint-30; to go on: --resume"
    assert (error.what, error.saved, error.resume) == ("loss is NaN at step 40", "checkpoint-30", "--resume")
    assert error.exit_status == 1
    assert isinstance(error, RuntimeError)


@pytest.mark.parametrize("text", ["two\nlines", "tabs\tand  spaces", "\r\nends\n"])
def test_always_one_line(text: str) -> None:
    for error in (RequestError(text, text, text), RunError(text, text, text)):
        assert str(error) == " ".join(str(error).split())
