"""Instruction tuning: Alpaca-format examples, answers labelled, packed block-diagonally.

Several examples share a sequence, and positions start at 0 with each: transformers reads that as a packed sequence
and lets no token attend to another example. The router's memory runs over depth and never meets another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from rmoe.data.blocks import IGNORED
from rmoe.data.tasks import Instruction
from rmoe.errors import RequestError

# The prompts of Stanford Alpaca, which the paper fine-tunes on.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """Token ids, and from which of them on they are the answer."""

    ids: list[int]
    answer: int


def prompt_of(item: Instruction) -> str:
    """What stands before the answer."""
    template = PROMPT_WITH_INPUT if item.input.strip() else PROMPT
    return template.format(instruction=item.instruction, input=item.input)


def encode(items: Sequence[Instruction], tokenizer: Any, length: int) -> list[Example]:
    """Tokens of each example, the end-of-text token last, cut to `length`.

    An example whose prompt alone fills the sequence has nothing to learn and is left out.

    Raises:
        RequestError: the tokenizer has no end-of-text token, or no example is left.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise RequestError("model", type(tokenizer).__name__, "a tokenizer with an end-of-text token")
    prompts = tokenizer([prompt_of(item) for item in items], return_attention_mask=False)["input_ids"]
    answers = tokenizer([item.output for item in items], add_special_tokens=False)["input_ids"]
    examples = [
        Example([*prompt, *answer, end][:length], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if len(prompt) < length
    ]
    if not examples:
        raise RequestError("--sequence-length", length, "more than the prompt of at least one example")
    return examples


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put examples into sequences of at most `length` tokens: longest first, each where it fits best.

    >>> sizes = [Example([0] * n, 0) for n in (6, 3, 5, 4, 2)]
    >>> [[len(e.ids) for e in row] for row in pack(sizes, 10)]
    [[6, 4], [5, 3, 2]]
    """
    rows: list[list[Example]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(length + 1)]
    for example in sorted(examples, key=lambda each: -len(each.ids)):
        size = len(example.ids)
        room = next((room for room in range(size, length + 1) if rows_by_room[room]), None)
        if room is None:
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            row = rows_by_room[room].pop()
        rows[row].append(example)
        rows_by_room[room - size].append(row)
    return rows


class PackedExamples(Dataset[dict[str, Tensor]]):
    """Sequences of packed examples: `input_ids`, `labels`, `position_ids`, each `[length]` int64.

    Labels are IGNORED outside answers. What is left at the end of a sequence is an example of its own without
    labels.
    """

    def __init__(self, rows: Sequence[Sequence[Example]], length: int, pad: int) -> None:
        self.rows, self.length, self.pad = rows, length, pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for example in self.rows[index]:
            size = len(example.ids)
            ids += example.ids
            labels += [IGNORED] * example.answer + example.ids[example.answer :]
            positions += range(size)
        rest = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [self.pad] * rest),
            "labels": torch.tensor(labels + [IGNORED] * rest),
            "position_ids": torch.tensor(positions + list(range(rest))),
        }


def can_pack(model: PreTrainedModel) -> bool:
    """Whether nothing but attention carries one token to another.

    A state-space, linear-attention or convolution layer would carry one example into the next.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or []
    return set(kinds) <= {"full_attention", "sliding_attention", "chunked_attention", "attention"}
