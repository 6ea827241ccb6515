"""Tiny models with a byte tokenizer beside them, and files to learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from rmoe.data.encode import byte_tokenizer
from rmoe.data.tasks import Instruction
from rmoe.finetune.instructions import Example, drafts, encode_drafts
from rmoe.graft import GraftSpec, graft_folder
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing.recurrence import Recurrence


def instructions(number: int) -> list[dict[str, str]]:
    """Alpaca-format lines of different lengths, every third with an input."""
    return [
        {
            "instruction": "Say it " + "again " * (n % 5),
            "input": f"part {n}" if n % 3 == 0 else "",
            "output": "yes " * (1 + n % 4),
        }
        for n in range(number)
    ]


def encode(items: list[Instruction], tokenizer: Any, length: int) -> list[Example]:
    """The examples of instructions and conversations."""
    return encode_drafts(drafts(items, tokenizer), tokenizer, length)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `rmoe`, `olmoe` (bfloat16), `grafted` and `adapter` (of the latter), each with a byte tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    config = RMoEConfig(
        vocab_size=320, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_experts=4
    )
    rmoe = RMoEForCausalLM(config)
    initialize(rmoe, 0)
    torch.manual_seed(0)
    olmoe = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            pad_token_id=257,
            eos_token_id=256,
        )
    ).to(torch.bfloat16)
    for name, model in (("rmoe", rmoe), ("olmoe", olmoe)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    graft_folder(
        root / "olmoe", root / "grafted", GraftSpec(recurrence=Recurrence.Config(width=8)), full=True
    )
    graft_folder(root / "olmoe", root / "adapter", GraftSpec(recurrence=Recurrence.Config(width=8)))
    return root


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "alpaca.jsonl", instructions(24))
