"""Instruction tuning: examples and conversations, answers labelled, packed block-diagonally.

Several examples share a sequence, and positions start at 0 with each: that is how transformers and this package's
model read a packed sequence, in which no token attends to another example. The router's memory runs over depth and
never meets another token. What is left of a sequence is padding: an attention mask keeps it out of routing, balance
losses and statistics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from rmoe.data.blocks import IGNORED
from rmoe.data.tasks import Conversation, Instruction
from rmoe.errors import RequestError
from rmoe.finetune.conversations import ANSWER, HEADINGS, PREAMBLE, PREAMBLE_WITH_INPUT, Segment, segments_of
from rmoe.model import RMoEForCausalLM
from rmoe.training.evaluation import inference


@dataclass(frozen=True)
class Example:
    """Token ids, and as labels those of answers; IGNORED elsewhere and at the first, which nothing in it predicts."""

    ids: list[int]
    labels: list[int]


def prompt_of(item: Instruction) -> str:
    """What stands before the answer: the prompts of Stanford Alpaca, which the paper fine-tunes on."""
    question = f"{HEADINGS['user']}\n{item.instruction}\n\n"
    if not item.input.strip():
        return f"{PREAMBLE}\n\n{question}{ANSWER}"
    return f"{PREAMBLE_WITH_INPUT}\n\n{question}### Input:\n{item.input}\n\n{ANSWER}"


def drafts(items: Sequence[Instruction], tokenizer: Any) -> list[list[Segment]]:
    """The text of each example, in segments that are learned or not; a conversation may be several examples.

    Raises:
        RequestError: the tokenizer's chat template refuses a conversation.
    """
    made: list[list[Segment]] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, Conversation):
            made += segments_of(item, tokenizer, number)
        else:
            made.append(
                [Segment(prompt_of(item), begins=True), Segment(item.output, learned=True, ends=True)]
            )
    return made


def encode_drafts(made: Sequence[Sequence[Segment]], tokenizer: Any, length: int) -> list[Example]:
    """Tokens of each example, the end-of-text token last, cut to `length`.

    An example whose prompt alone fills the sequence has nothing to learn and is left out.

    Raises:
        RequestError: the tokenizer has no end-of-text token, or no example is left.
    """
    if tokenizer.eos_token_id is None:
        raise RequestError("model", type(tokenizer).__name__, "a tokenizer with an end-of-text token")
    examples = [_example(draft, tokenizer, length) for draft in made]
    kept = [example for example in examples if set(example.labels) != {IGNORED}]
    if not kept:
        raise RequestError("--sequence-length", length, "more than the prompt of at least one example")
    return kept


def _by_segment(draft: Sequence[Segment], tokenizer: Any) -> Iterator[tuple[Segment, list[int]]]:
    """The ids of each segment.

    What lies between two end-of-text tokens is tokenized as one text, as it will be when the model is asked: a token
    is of the segment in which it ends. Segment by segment, if the tokenizer does not say where its tokens are.
    """
    fast = tokenizer.is_fast
    cuts = [0, *(n for n, each in enumerate(draft, 1) if each.ends or n == len(draft) or not fast)]
    for start, stop in pairwise(cuts):
        segments = draft[start:stop]
        found = tokenizer(
            "".join(segment.text for segment in segments),
            add_special_tokens=segments[0].begins,
            return_attention_mask=False,
            return_offsets_mapping=fast,
        )
        ends = list(accumulate(len(segment.text) for segment in segments))
        places = found["offset_mapping"] if fast else [(0, 0)] * len(found["input_ids"])
        # Tokens that are not in the text are at (0, 0): they stay with the one before.
        owners = accumulate((bisect_left(ends, last) for _, last in places), max)
        ids: list[list[int]] = [[] for _ in segments]
        for owner, token in zip(owners, found["input_ids"], strict=True):
            ids[owner].append(token)
        yield from zip(segments, ids, strict=True)


def _example(draft: Sequence[Segment], tokenizer: Any, length: int) -> Example:
    """One example of its segments."""
    ids: list[int] = []
    labels: list[int] = []
    for segment, of_segment in _by_segment(draft, tokenizer):
        if segment.ends and not _ended(of_segment, tokenizer):
            of_segment = [*of_segment, tokenizer.eos_token_id]
        ids += of_segment
        labels += of_segment if segment.learned else [IGNORED] * len(of_segment)
    return Example(ids[:length], [IGNORED, *labels[1:length]])


def _ended(ids: list[int], tokenizer: Any) -> bool:
    """Whether the end-of-text token is the last but for the blanks that a chat template puts after it."""
    if tokenizer.eos_token_id not in ids:
        return False
    after = ids[::-1].index(tokenizer.eos_token_id)
    return not tokenizer.decode(ids[len(ids) - after :]).strip()


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put examples into sequences of at most `length` tokens: longest first, each where it fits best.

    >>> sizes = [Example([0] * n, [0] * n) for n in (6, 3, 5, 4, 2)]
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
    """Sequences of packed examples: `input_ids`, `labels`, `position_ids`, `attention_mask`, each `[length]` int64.

    Labels are IGNORED outside answers. What is left at the end of a sequence is padding: an example of its own
    without labels, and 0 in the mask.

    Args:
        rows: the examples of each sequence.
        masked: False leaves the mask out, see `needs_mask`.

    Attributes:
        sizes: tokens of each sequence without its padding.
    """

    def __init__(self, rows: Sequence[Sequence[Example]], length: int, pad: int, masked: bool = True) -> None:
        self.rows, self.length, self.pad, self.masked = rows, length, pad, masked
        self.sizes = [sum(len(example.ids) for example in row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for example in self.rows[index]:
            ids += example.ids
            labels += example.labels
            positions += range(len(example.ids))
        rest = self.length - len(ids)
        row = {
            "input_ids": torch.tensor(ids + [self.pad] * rest),
            "labels": torch.tensor(labels + [IGNORED] * rest),
            "position_ids": torch.tensor(positions + list(range(rest))),
        }
        if self.masked:
            row["attention_mask"] = torch.tensor([1] * len(ids) + [0] * rest)
        return row


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why examples cannot share a sequence of this model; None if they can."""
    if not can_pack(model):
        return "this model has layers other than attention, which would carry one example into the next"
    if _balances(model):
        return "this family's balance loss needs an attention mask, with which it cannot keep examples apart"
    if isinstance(model, RMoEForCausalLM):
        return "this model's router reads a token's earlier tokens" if model.trunk.reads_sequence else None
    if _carries(model):
        return "this family's attention reads the examples of a sequence as one text"
    return None


def needs_mask(model: PreTrainedModel, packed: bool) -> bool:
    """Whether padding has to be masked.

    A family of transformers that gets a mask reads a packed sequence as one text; without one it keeps the padding
    apart as an example of its own, which nothing reads as long as it has no balance loss.
    """
    return not packed or isinstance(model, RMoEForCausalLM)


def _balances(model: PreTrainedModel) -> bool:
    """Whether a family of transformers adds a balance loss, which would count padding."""
    config = model.config.get_text_config()
    return bool(getattr(config, "output_router_logits", False)) and not isinstance(model, RMoEForCausalLM)


def _carries(model: PreTrainedModel) -> bool:
    """Whether what a model makes of the second of two packed examples depends on the first, by trying it."""
    length, vocabulary = 8, model.config.get_text_config().vocab_size
    texts = ([token % vocabulary for token in range(start, start + length)] for start in (3, 11, 19))
    first, other, second = (Example(ids, ids) for ids in texts)
    masked = needs_mask(model, packed=True)
    sequences = PackedExamples([[first, second], [other, second]], 3 * length, 0, masked)
    logits = []
    with inference(model) as device:
        for index in range(len(sequences)):
            row = {name: tensor[None].to(device) for name, tensor in sequences[index].items()}
            del row["labels"]
            logits.append(model(**row, use_cache=False).logits[0, length : 2 * length].float())
    moved = (logits[0] - logits[1]).abs().mean()
    return bool(moved > 0.05 * logits[0].abs().mean())  # half precision alone moves less, another text more


def can_pack(model: PreTrainedModel) -> bool:
    """Whether nothing but attention carries one token to another, going by the names of the layers.

    A state-space, linear-attention or convolution layer would carry one example into the next.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or []
    return set(kinds) <= {"full_attention", "sliding_attention", "chunked_attention", "attention"}
