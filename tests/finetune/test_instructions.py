"""Examples, labels, and packing that keeps examples apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import rmoe
from rmoe.data.blocks import IGNORED
from rmoe.data.encode import byte_tokenizer
from rmoe.data.tasks import Instruction
from rmoe.errors import RequestError
from rmoe.finetune.instructions import (
    Example,
    PackedExamples,
    can_pack,
    needs_mask,
    pack,
    prompt_of,
    why_not_packed,
)
from rmoe.training.accounting import StepSums
from rmoe.training.learner import ModelLearner
from rmoe.training.place import Ranks
from tests.finetune.conftest import encode, instructions
from tests.graft.conftest import at_work
from tests.graft.tiny_families import PROMISED, tiny_model

ITEMS = [Instruction(**row) for row in instructions(9)]


def test_the_prompt_is_alpacas() -> None:
    assert prompt_of(ITEMS[1]).endswith("### Instruction:\nSay it again \n\n### Response:\n")
    assert "### Input:\npart 3\n\n### Response:\n" in prompt_of(ITEMS[3])
    assert "### Input" not in prompt_of(ITEMS[1])


def test_only_the_answer_and_its_end_are_labelled() -> None:
    tokenizer = byte_tokenizer()
    (example,) = encode([ITEMS[3]], tokenizer, 512)
    row = PackedExamples([[example]], 512, 257)[0]
    labelled = row["labels"] != IGNORED
    assert tokenizer.decode(row["input_ids"][labelled][:-1]) == ITEMS[3].output
    assert row["input_ids"][labelled][-1] == tokenizer.eos_token_id
    assert torch.equal(row["labels"][labelled], row["input_ids"][labelled])


def test_long_examples_are_cut_and_prompts_that_fill_a_sequence_left_out() -> None:
    lengths = [len(prompt_of(item)) for item in ITEMS]
    limit = sorted(lengths)[4] + 1
    examples = encode(ITEMS, byte_tokenizer(), limit)
    assert len(examples) == sum(length < limit for length in lengths)
    assert max(len(example.ids) for example in examples) <= limit
    with pytest.raises(RequestError, match="--sequence-length"):
        encode(ITEMS, byte_tokenizer(), 10)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_loses_nothing_and_overfills_nothing(sizes: list[int]) -> None:
    examples = [Example([n] * size, [n] * size) for n, size in enumerate(sizes)]
    rows = pack(examples, 20)
    assert sorted(e.ids[0] for row in rows for e in row) == list(range(len(sizes)))
    fill = [sum(len(e.ids) for e in row) for row in rows]
    assert max(fill) <= 20
    assert all(a + b > 20 for i, a in enumerate(fill) for b in fill[i + 1 :]), (
        "two rows would have fitted in one"
    )


@pytest.mark.parametrize("name", ["rmoe", "grafted"])
def test_packed_examples_do_not_see_each_other(name: str, models: Path) -> None:
    model: Any = rmoe.load(models / name, dtype=torch.float32)
    if name == "grafted":
        model = at_work(model)
    examples = encode(ITEMS, byte_tokenizer(), 512)
    rows = pack(examples, 512)
    assert max(len(row) for row in rows) > 1
    dataset = PackedExamples(rows, 512, 257)
    with torch.no_grad():
        for index, row in enumerate(rows):
            item = dataset[index]
            packed = model(
                input_ids=item["input_ids"][None], position_ids=item["position_ids"][None], use_cache=False
            ).logits[0]
            start = 0
            for example in row:
                alone = model(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0]
                together = packed[start : start + len(example.ids)]
                torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
                start += len(example.ids)


@pytest.mark.parametrize("counted", [True, False])
def test_training_keeps_packed_examples_apart(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in families whose loss is not divided by the step's tokens: with a cache they mix what is packed."""
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=64)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    assert why_not_packed(model) is None
    texts = [list(range(3, 13)), list(range(20, 31)), list(range(40, 50))]
    first, other, second = (Example(ids, ids) for ids in texts)
    rows = PackedExamples([[first, second], [other, second]], 24, 0, needs_mask(model, packed=True))
    monkeypatch.setattr("rmoe.training.learner._counts_tokens", lambda _: counted)
    learner = ModelLearner(model, Accelerator(cpu=True), Ranks(), 1)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    for index, start in enumerate((10, 11)):
        learner.accumulate([{name: part[None] for name, part in rows[index].items()}], StepSums())
        seen[-1] = seen[-1][0, start : start + 10]
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def test_layers_that_carry_tokens_across_examples_are_not_packed() -> None:
    assert can_pack(tiny_model("olmoe"))
    assert can_pack(tiny_model("gpt_oss"))
    for family in ("jamba", "qwen3_next", "lfm2_moe", "minimax"):
        assert not can_pack(tiny_model(family)), family


@pytest.mark.parametrize("family", [*PROMISED, "afmoe"])
def test_packed_examples_are_apart_or_not_packed(family: str) -> None:
    model = tiny_model(family).eval()
    refused = why_not_packed(model)
    if family in ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3"):
        assert refused is None
    if family in ("gpt_oss", "afmoe"):
        assert "as one text" in str(refused)
    if refused is None:
        rows = [[Example(ids, ids) for ids in (list(range(3, 23)), list(range(30, 47)))]]
        row = PackedExamples(rows, 48, 0, needs_mask(model, packed=True))[0]
        del row["labels"]
        with torch.no_grad():
            packed = model(**{name: part[None] for name, part in row.items()}, use_cache=False).logits[0]
            alone = model(input_ids=torch.tensor([rows[0][1].ids]), use_cache=False).logits[0]
        torch.testing.assert_close(packed[20:37], alone, rtol=1e-3, atol=1e-5)
