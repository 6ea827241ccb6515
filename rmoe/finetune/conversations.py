"""Conversations as text: by the tokenizer's chat template, or under headings where it has none."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rmoe.data.tasks import Conversation, Message
from rmoe.errors import RequestError, one_line

# Stanford Alpaca's, so that one question and its answer are the same example whichever form the file has.
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
HEADINGS = {"system": "### System:", "user": "### Instruction:"}
ANSWER = "### Response:\n"


@dataclass(frozen=True)
class Segment:
    """Part of an example's text.

    Attributes:
        learned: whether its tokens are labels.
        begins: whether the tokenizer puts before it what it begins a text with.
        ends: whether the end-of-text token follows, unless the segment has it.
    """

    text: str
    learned: bool = False
    begins: bool = False
    ends: bool = False


def segments_of(item: Conversation, tokenizer: Any, number: int) -> list[list[Segment]]:
    """The examples that a conversation makes, each in segments; those of answers are learned.

    With a chat template the text is what the template makes of the messages. It is one example where each answer's
    text continues the last one's; where a template writes an earlier answer otherwise than the last (it drops the
    reasoning of earlier answers, say), every answer is an example of its own, after the prompt that the template
    makes for it.

    Args:
        number: of the item in its file, for messages.

    Raises:
        RequestError: the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [_under_headings(item.messages)]
    answers = [index for index, message in enumerate(item.messages) if message.role == "assistant"]
    turns = [_turn(item.messages, index, tokenizer, number) for index in answers]
    learned = [item.messages[index].learned for index in answers]
    if any(not after[0].startswith(before[1]) for before, after in pairwise(turns)):
        return [
            [Segment(prompt), Segment(whole[len(prompt) :], learned=True, ends=True)]
            for (prompt, whole), wanted in zip(turns, learned, strict=True)
            if wanted
        ]
    segments, done = [], 0
    for place, ((prompt, whole), wanted) in enumerate(zip(turns, learned, strict=True)):
        segments.append(Segment(whole[done : len(prompt)]))
        segments.append(Segment(whole[len(prompt) :], learned=wanted, ends=place == len(turns) - 1))
        done = len(whole)
    return [segments]


def _turn(messages: tuple[Message, ...], index: int, tokenizer: Any, number: int) -> tuple[str, str]:
    """(prompt, prompt and answer) of one answer, as the template renders them."""

    def render(count: int, ask: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages[:count]]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))

    try:
        whole = render(index + 1, False)
        for ask in (True, False):  # a prompt may open a block of reasoning that the answer does not have
            prompt = render(index, ask) if index else ""
            if whole.startswith(prompt):
                return prompt, whole
    except Exception as error:  # a template refuses by raising what it likes
        allowed = f"messages that the tokenizer's chat template takes ({one_line(str(error))[:200]})"
        raise RequestError("--data", f"conversation {number}", allowed) from None
    allowed = "a chat template that only adds text when an answer is added"
    raise RequestError("chat template", f"conversation {number}", allowed)


def _under_headings(messages: tuple[Message, ...]) -> list[Segment]:
    """`### Instruction:`, `### Response:` for each turn, after the system's message or Alpaca's first sentence."""
    rest = messages
    preamble = PREAMBLE
    if messages[0].role == "system":
        preamble, rest = messages[0].content, messages[1:]
    segments: list[Segment] = []
    pending = f"{preamble}\n\n"
    for message in rest:
        if message.role == "assistant":
            segments.append(Segment(pending + ANSWER, begins=not segments))
            segments.append(Segment(message.content, learned=message.learned, ends=True))
            pending = "\n\n"
        else:
            pending += f"{HEADINGS[message.role]}\n{message.content}\n\n"
    return segments
