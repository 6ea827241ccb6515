"""What LoRA adds to a model: from which seed, in which precision, on which modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rmoe
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.lora import with_lora

pytest.importorskip("peft")


def adapted(folder: Path, **options: Any) -> Any:
    return with_lora(rmoe.load(folder), FinetuneConfig(lora_rank=2, **options))


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_the_seed_draws_the_adapters(models: Path) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 1)  # whatever was drawn before
        return trained(adapted(models / "grafted", seed=seed))

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("freeze", ["none", "router+cell"])
def test_what_is_trained_of_a_bfloat16_model_is_float32(freeze: str, models: Path) -> None:
    model = adapted(models / "grafted", freeze=freeze)
    found = trained(model)
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert any(".gate." in name for name in found) == (freeze == "none")
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
