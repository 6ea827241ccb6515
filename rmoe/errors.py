"""The two ways a command ends badly, and how each is said.

A `RequestError` means the request itself is wrong: nothing was written, and the command line exits with 2.
A `RunError` means a run that was right to start has failed: it says what was saved and how to go on, exit 1.
`Stopped` is neither: a run that was told to end has saved.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    r"""The text in one line, `?` for each character that a terminal might obey: it can come from a hostile file.

    >>> one_line("a\n b\x1b[2J")
    'a b?[2J'
    """
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


class RequestError(ValueError):
    """A request that cannot be carried out, said in one line.

    Args:
        field: what was wrong, by the name its user gave it (`gate.k`, `--data`, `router`).
        value: the value that was given.
        allowed: what would have been accepted, as a phrase.

    >>> str(RequestError("gate.k", 9, "1 to num_experts (8)"))
    'gate.k is 9; allowed: 1 to num_experts (8)'
    """

    exit_status = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(one_line(f"{field} is {value!r}; allowed: {allowed}"))


class RunError(RuntimeError):
    """A run that failed after it began.

    Args:
        what: what happened.
        saved: what is safe on disk ("nothing was written" counts).
        resume: how to go on.

    >>> str(RunError("loss is NaN at step 40", "checkpoint-30 in runs/a", "run again with --resume"))
    'loss is NaN at step 40; saved: checkpoint-30 in runs/a; to go on: run again with --resume'
    """

    exit_status = 1

    def __init__(self, what: str, saved: str, resume: str) -> None:
        self.what, self.saved, self.resume = what, saved, resume
        super().__init__(one_line(f"{what}; saved: {saved}; to go on: {resume}"))


class Stopped(Exception):
    """The run was asked to stop, has saved everything, and can be resumed; the text says so."""
