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
from rmoe.graft import GraftSpec
from rmoe.graft.auto import graft
from rmoe.moe import record, routed_layers
from rmoe.routing.recurrence import Recurrence
from tests.graft.tiny_families import tiny_model

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


@pytest.mark.parametrize("grafted", [False, True])
def test_a_gate_of_the_shared_expert_is_no_router(grafted: bool) -> None:
    model = tiny_model("qwen2_moe")
    if grafted:
        graft(model, GraftSpec(recurrence=Recurrence.Config(width=8)))
    gates = {layer.gate_name for layer in routed_layers(model)}
    adapted = with_lora(model, FinetuneConfig(lora_rank=2))
    copied = {name for name in trained(adapted) if ".modules_to_save." in name}
    cells = {"model.router_cell"} if grafted else set()
    owners = {name.removeprefix("base_model.model.").partition(".modules_to_save.")[0] for name in copied}
    assert owners == gates | cells
    assert any("shared_expert_gate.lora_A" in name for name in trained(adapted))
    with record(adapted) as found, torch.no_grad():
        adapted(input_ids=torch.arange(3, 13)[None])
    assert len(found.sequences) == 1
