"""Padding counts for nothing: packed or not, in the loss, the gradients and the statistics of routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import rmoe
from rmoe.data.blocks import IGNORED
from rmoe.data.encode import byte_tokenizer
from rmoe.data.tasks import Instruction, Labelled
from rmoe.finetune.classification import LabelledTexts, label_loss, load_classifier, predict
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.instructions import PackedExamples, needs_mask, pack, why_not_packed
from rmoe.finetune.run import finetune
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.model.packing import starts_again
from rmoe.training.metrics import read_metrics
from tests.finetune.conftest import encode, instructions

LENGTH = 520
EXAMPLES = encode([Instruction(**row) for row in instructions(7)], byte_tokenizer(), LENGTH)


def tiny(router: str, attention: str = "sdpa") -> RMoEForCausalLM:
    model = RMoEForCausalLM(
        RMoEConfig(
            vocab_size=320, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=3, num_experts=4,
            num_attention_heads=2, router=router, attn_implementation=attention,
        )
    )  # fmt: skip
    initialize(model, 0)
    return model.double()


def batch_of(rows: list[list[Any]]) -> dict[str, torch.Tensor]:
    sequences = PackedExamples(rows, LENGTH, 257)
    items = [sequences[index] for index in range(len(sequences))]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def unpadded() -> dict[str, torch.Tensor]:
    """The same examples as one sequence without any padding."""
    ids = [token for example in EXAMPLES for token in example.ids]
    labels = [label for example in EXAMPLES for label in example.labels]
    positions = [position for example in EXAMPLES for position in range(len(example.ids))]
    rows = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([row]) for name, row in rows.items()}


def learned(model: RMoEForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**batch, use_cache=False, num_items_in_batch=100)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("router", "attention"),
    [("rmoe", "sdpa"), ("smoe-bias", "eager"), ("hash", "sdpa")],
)
def test_a_padded_batch_is_its_examples_without_padding(router: str, attention: str, packed: bool) -> None:
    """Outputs, balance loss and gradients, in float64, against one sequence that has no padding."""
    model = tiny(router, attention).train()
    rows = pack(EXAMPLES, LENGTH) if packed else [[example] for example in EXAMPLES]
    assert (max(len(row) for row in rows) > 1) == packed
    batch = batch_of(rows)
    assert batch["input_ids"].numel() > batch["attention_mask"].sum() + 100
    out, gradients = learned(model, batch)
    reference, expected = learned(model, unpadded())
    real = sum(len(example.ids) for example in EXAMPLES)
    assert int(out.router_stats.tokens) == int(reference.router_stats.tokens) == real
    assert torch.equal(out.router_stats.counts, reference.router_stats.counts)
    torch.testing.assert_close(out.lm_loss, reference.lm_loss, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.aux_loss, reference.aux_loss, rtol=1e-6, atol=1e-8)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_expert_choice_gives_padding_no_expert() -> None:
    """Its experts take their tokens from the whole batch: padding would take places of real tokens."""
    model = tiny("expert-choice").eval()
    batch = batch_of(pack(EXAMPLES, LENGTH))
    out = model(**batch, use_cache=False, output_routing=True)
    padding = ~batch["attention_mask"].reshape(-1).bool()
    assert padding.any()
    for routing in out.routing:
        assert not routing.weights[padding].any()


@pytest.mark.parametrize(
    ("mask", "positions", "packed"),
    [
        ([1, 1, 1, 1, 1, 0], [0, 1, 2, 0, 1, 0], True),
        ([1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 1], True),  # padding between two examples
        ([1, 1, 1, 0, 0, 0], [0, 1, 2, 0, 1, 2], False),  # the padding alone starts again
        ([0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 2, 3], False),  # on the left, as `generate` numbers it
        ([0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5], False),
        ([1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5], False),
    ],
)
def test_what_is_packed(mask: list[int], positions: list[int], packed: bool) -> None:
    given, places = torch.tensor([mask]), torch.tensor([positions])
    assert starts_again(given, places) == packed


def test_a_family_with_a_balance_loss_is_not_packed(models: Path) -> None:
    """Its loss reads the mask, and with a mask transformers reads a packed sequence as one text."""
    olmoe: Any = rmoe.load(models / "olmoe")
    assert why_not_packed(olmoe) is None
    assert (needs_mask(olmoe, True), needs_mask(olmoe, False)) == (False, True)
    config = OlmoeConfig(**olmoe.config.to_dict() | {"output_router_logits": True})
    balanced = OlmoeForCausalLM(config)
    assert "balance loss" in str(why_not_packed(balanced))
    rmoe_model: Any = rmoe.load(models / "rmoe")
    assert why_not_packed(rmoe_model) is None
    assert needs_mask(rmoe_model, True)


@pytest.mark.parametrize("router", ["mcf-moe", "uniform"])
def test_a_router_that_reads_earlier_tokens_is_not_packed(router: str) -> None:
    assert "reads a token's earlier tokens" in str(why_not_packed(RMoEForCausalLM(RMoEConfig(router=router))))


def test_a_run_counts_real_tokens(models: Path, alpaca: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from rmoe.training.loop import Loop

    seen = []
    end_step = Loop.end_step

    def look(self: Loop) -> None:
        assert self.sums.stats is not None
        seen.append(int(self.sums.stats.tokens))
        end_step(self)

    monkeypatch.setattr(Loop, "end_step", look)
    options: dict[str, Any] = {"batch_size": 24, "epochs": 1.0, "device": "cpu", "threads": 1}
    config = FinetuneConfig(**options, sequence_length=512, packing=False)
    finetune(models / "rmoe", alpaca, tmp_path / "out", config, progress=False)
    rows = [Instruction(**row) for row in instructions(24)]
    real = sum(len(example.ids) for example in encode(rows, byte_tokenizer(), 512))
    assert seen[-1] == real  # not packed: a step is all 24 examples once
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["tokens"] == real


def test_labels_of_padding_are_ignored() -> None:
    batch = batch_of([[EXAMPLES[0]]])
    padding = ~batch["attention_mask"].bool()
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["input_ids"][padding] == 257).all()


def test_a_class_does_not_depend_on_the_batch(models: Path) -> None:
    model = load_classifier(models / "rmoe", ["a", "b"], 257, 0).eval()
    items = [Labelled(text="x" * size, label="a") for size in (3, 40, 11)]
    texts = LabelledTexts(items, ["a", "b"], byte_tokenizer(), 64, 257)
    with torch.no_grad():
        together = model(**texts.collate([texts[0], texts[1], texts[2]]))
        alone = [model(**texts.collate([texts[index]])).logits for index in range(3)]
    assert int(together.router_stats.tokens) == 54
    torch.testing.assert_close(together.logits, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert predict(model, texts, batch_size=3) == predict(model, texts, batch_size=1)
    expected = torch.nn.functional.cross_entropy(torch.cat(alone), torch.zeros(3, dtype=torch.int64))
    assert label_loss(model, texts, batch_size=2).loss == pytest.approx(expected.item(), rel=1e-5)
