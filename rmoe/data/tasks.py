"""Local task files: multiple choice, classification, instructions or conversations, questions, texts.

JSON lines, a JSON array, csv or parquet (see `rmoe.data.rows`). Strict: every row is checked before the first is used,
and an error names the file, the line and the key. Fields that a kind does not have are passed over, and an optional
field may be null. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import msgspec

from rmoe.data.rows import Row, read_rows
from rmoe.errors import RequestError
from rmoe.places import expand


class Task(msgspec.Struct, frozen=True):
    """One item of a task file."""

    may_be_empty: ClassVar[tuple[str, ...]] = ()  # keys whose text may be empty

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """The item of a row: null in an optional field is as if the field were not there.

        Raises:
            msgspec.ValidationError: a field is missing or of the wrong type.
        """
        optional = {field.name for field in msgspec.structs.fields(cls) if not field.required}
        kept = {name: value for name, value in row.items() if value is not None or name not in optional}
        return msgspec.convert(kept, cls)

    def problem(self) -> str | None:
        """What is wrong with an item whose keys and types are right, naming the key; None if nothing is."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, str) and not value.strip() and name not in self.may_be_empty:
                return f"`{name}` is empty"
        return None


class MultipleChoice(Task, frozen=True):
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
    """An instruction, its input (may be empty) and the output to learn; or a `Conversation`."""

    may_be_empty: ClassVar[tuple[str, ...]] = ("input",)

    instruction: str
    output: str
    input: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """As `Task.of`; a row with `messages` or `conversations` is a `Conversation`, which is an instruction too."""
        for key in CONVERSATIONS:
            if row.get(key) is not None:
                return Conversation.from_turns(key, row[key])  # type: ignore[return-value]
        return super().of(row)


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation; `learned` is whether an answer is one to train on."""

    role: str
    content: str
    learned: bool = True


# The two keys under which a row has a conversation, and what each role is called in a chat template.
CONVERSATIONS = ("messages", "conversations")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


def join_parts(texts: Iterable[str]) -> str:
    """The content of a message that has several parts: lines of one text."""
    return "\n".join(texts)


class Conversation(Instruction, frozen=True):
    """A conversation; `instruction` is its first question and `output` its last answer."""

    messages: tuple[Message, ...] = ()

    @classmethod
    def from_turns(cls, key: str, turns: object) -> Self:
        """From `[{"role", "content"}, ...]` or ShareGPT's `[{"from", "value"}, ...]`, up to its last answer.

        Raises:
            msgspec.ValidationError: it is neither, has a role that is unknown, or no answer.
        """
        if not isinstance(turns, list):
            raise msgspec.ValidationError(f"Expected `array`, got `{type(turns).__name__}` - at `$.{key}`")
        messages = [_message(turn, f"$.{key}[{number}]") for number, turn in enumerate(turns)]
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if not any(messages[number].learned for number in answers):
            raise msgspec.ValidationError(f"`{key}` has no answer to learn (a message of the role assistant)")
        messages = messages[: answers[-1] + 1]
        question = next((message.content for message in messages if message.role == "user"), "")
        return cls(instruction=question, output=messages[-1].content, messages=tuple(messages))

    def problem(self) -> str | None:
        """See `Task.problem`."""
        return None  # `from_turns` has looked


def _message(turn: object, where: str) -> Message:
    """One turn, or what is wrong with it."""
    if not isinstance(turn, dict):
        raise msgspec.ValidationError(f"Expected `object`, got `{type(turn).__name__}` - at `{where}`")
    names = ("from", "value") if "from" in turn else ("role", "content")
    role, content = (turn.get(name) for name in names)
    if not isinstance(role, str) or role not in ROLES:
        raise msgspec.ValidationError(
            f"role {role!r:.40}, not one of {', '.join(ROLES)} - at `{where}.{names[0]}`"
        )
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            raise msgspec.ValidationError(f"`{name}`, which is not read - at `{where}`")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = join_parts(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise msgspec.ValidationError(f"Expected `str`, got `{_kind(content)}` - at `{where}.{names[1]}`")
    if ROLES[role] == "assistant" and not content.strip():
        raise msgspec.ValidationError(f"an empty answer - at `{where}.{names[1]}`")
    weight = turn.get("weight")
    return Message(ROLES[role], content, learned=weight is None or bool(weight))


def _kind(value: object) -> str:
    """A value's type, by its name in JSON."""
    return "null" if value is None else type(value).__name__


class Question(Task, frozen=True):
    """A question and its free-text answer."""

    question: str
    answer: str


class Passage(Task, frozen=True):
    """A text alone: predict its last word (LAMBADA), or all of it."""

    text: str


T = TypeVar("T", bound=Task)


def read_tasks(
    path: Path, kind: type[T], labels: Collection[int | str] | None = None, field: str = "--data"
) -> list[T]:
    """All items of a task file.

    Args:
        path: JSON lines, a JSON array (both also `.gz`), csv or parquet.
        kind: what each row holds.
        labels: classification: the labels of the training set; another label is an error. None takes any.
        field: the option that named the file, for errors.

    Raises:
        RequestError: the file is missing, unreadable, empty, or a row is not JSON, lacks a key, has one of the wrong
            type, an empty text, a label out of range or outside `labels`. It names the line and the key.
    """
    items: list[T] = []
    allowed = f"an object with {described(kind)}"
    for row in read_rows(expand(path, field), allowed, columns_of(kind), field=field):
        try:
            item = kind.of(row.values if row.typed else _read_cells(row, kind))
            problem = item.problem()
        except msgspec.ValidationError as error:
            problem = str(error)
        if problem is None and isinstance(item, Labelled) and labels is not None and item.label not in labels:
            problem = f"`label` is {item.label!r}, which the training set does not have"
        if problem is not None:
            raise RequestError(row.where, problem, allowed)
        items.append(item)
    if not items:
        raise RequestError(str(path), "empty", f"lines of objects with {described(kind)}")
    return items


def columns_of(kind: type[Task]) -> set[str]:
    """Every key of a row that is read."""
    names = {field.name for field in msgspec.structs.fields(kind)}
    return names | set(CONVERSATIONS) if issubclass(kind, Instruction) else names


def _read_cells(row: Row, kind: type[Task]) -> dict[str, Any]:
    """The text of csv cells as what their fields hold: numbers and lists as JSON writes them, empty cells as null."""
    texts = {field.name for field in msgspec.structs.fields(kind) if field.type is str}
    return {name: cell if name in texts else _read_cell(cell) for name, cell in row.values.items()}


def _read_cell(cell: str) -> Any:
    cell = cell.strip()
    if not cell:
        return None
    if cell[0] in "[{" or cell.removeprefix("-").isdecimal():
        try:
            return msgspec.json.decode(cell)
        except (msgspec.DecodeError, RecursionError):
            return cell
    return cell


def described(kind: type[Task]) -> str:
    """A kind's keys, for messages.

    >>> described(Instruction)
    'instruction, output, [input], or messages, or conversations'
    """
    fields = msgspec.structs.fields(kind)
    keys = ", ".join(field.name if field.required else f"[{field.name}]" for field in fields)
    return f"{keys}, or {', or '.join(CONVERSATIONS)}" if issubclass(kind, Instruction) else keys
