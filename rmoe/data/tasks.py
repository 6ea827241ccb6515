"""Local task files: JSON lines (or `.jsonl.gz`) of multiple choice, classification, instructions, questions, texts.

Strict: every line is checked before the first is used, and an error names the file, the line and the key. Fields that
a kind does not have are passed over. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import msgspec

from rmoe.data.text import read_lines
from rmoe.errors import RequestError
from rmoe.records import NOT_JSON


class Task(msgspec.Struct, frozen=True):
    """One item of a task file."""

    def problem(self) -> str | None:
        """What is wrong with an item whose keys and types are right, naming the key; None if nothing is."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, str) and not value.strip() and name not in self.may_be_empty():
                return f"`{name}` is empty"
        return None

    @classmethod
    def may_be_empty(cls) -> Collection[str]:
        """Keys whose text may be empty."""
        return ()


class Choice(Task, frozen=True):
    """Multiple choice; `label` is the index of the right one of `choices`."""

    question: str
    choices: list[str]
    label: int

    def problem(self) -> str | None:
        """See `Task.problem`."""
        if len(self.choices) < 2:
            return f"`choices` has {len(self.choices)} entries, fewer than 2"
        if not all(choice.strip() for choice in self.choices):
            return "`choices` has an empty answer"
        if not 0 <= self.label < len(self.choices):
            return f"`label` is {self.label}, not an index of {len(self.choices)} choices"
        return super().problem()


class Labelled(Task, frozen=True):
    """Text classification; a label is a number or a name."""

    text: str
    label: int | str


class Instruction(Task, frozen=True):
    """An instruction, its input (may be empty) and the output to learn."""

    instruction: str
    output: str
    input: str = ""

    @classmethod
    def may_be_empty(cls) -> Collection[str]:
        """See `Task.may_be_empty`."""
        return ("input",)


class Question(Task, frozen=True):
    """A question and its free-text answer."""

    question: str
    answer: str


class Passage(Task, frozen=True):
    """A text alone: predict its last word (LAMBADA), or all of it."""

    text: str


KINDS: tuple[type[Task], ...] = (Choice, Labelled, Instruction, Question, Passage)
T = TypeVar("T", bound=Task)


def read_tasks(path: Path, kind: type[T], labels: Collection[int | str] | None = None) -> list[T]:
    """All items of a task file.

    Args:
        path: `.jsonl` or `.jsonl.gz`; blank lines are passed over.
        kind: what each line holds.
        labels: classification: the labels of the training set; another label is an error. None takes any.

    Raises:
        RequestError: the file is missing, unreadable, empty, or a line is not JSON, lacks a key, has one of the wrong
            type, an empty text, a label out of range or outside `labels`. It names the line and the key.
    """
    decode = msgspec.json.Decoder(kind).decode
    items: list[T] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            item = decode(line)
            problem = item.problem()
        except NOT_JSON as error:
            problem = str(error)
        if problem is None and isinstance(item, Labelled) and labels is not None and item.label not in labels:
            problem = f"`label` is {item.label!r}, which the training set does not have"
        if problem is not None:
            raise RequestError(f"{path.name} line {number}", problem, f"an object with {described(kind)}")
        items.append(item)
    if not items:
        raise RequestError(str(path), "empty", f"lines of objects with {described(kind)}")
    return items


def kind_of(path: Path) -> type[Task]:
    """The kind of a task file, told from the keys of its first line.

    Raises:
        RequestError: the file has no line, or its first is of no kind.
    """
    allowed = "objects with " + ", or ".join(described(kind) for kind in KINDS)
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).keys()
        except NOT_JSON as error:
            raise RequestError(f"{path.name} line {number}", str(error), allowed) from error
        for kind in KINDS:
            if required(kind) <= keys:
                return kind
        raise RequestError(f"{path.name} line {number}", f"keys {', '.join(keys)}", allowed)
    raise RequestError(str(path), "empty", f"lines of {allowed}")


def required(kind: type[Task]) -> set[str]:
    """The keys a line must have."""
    return {field.name for field in msgspec.structs.fields(kind) if field.required}


def described(kind: type[Task]) -> str:
    """A kind's keys, for messages.

    >>> described(Instruction)
    'instruction, output, [input]'
    """
    fields = msgspec.structs.fields(kind)
    return ", ".join(field.name if field.required else f"[{field.name}]" for field in fields)
