"""Grafted routers are where the ecosystem looks for routers: transformers' capture and PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rmoe.graft import graft
from rmoe.graft.attach import OFFSET
from tests.graft.conftest import SPEC, at_work, grafted
from tests.graft.tiny_families import PROMISED, TOKENS, tiny_model
from tests.reload import assert_reloaded, assert_same_logits
from tests.versions import older


@pytest.mark.parametrize("model_type", PROMISED)
def test_router_logits_are_captured_as_before(model_type: str) -> None:
    plain = tiny_model(model_type)
    model = graft(copy.deepcopy(plain), SPEC)
    with torch.no_grad():
        outputs = [m(TOKENS, output_router_logits=True) for m in (plain, model)]
        if older("transformers", "5.23") and "router_logits" not in outputs[0]:
            pytest.skip("this release of transformers has no router logits for the family")
        before, start = (out.router_logits for out in outputs)
        assert len(before) > 0
        assert len(before) == len(start)
        assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True))
        after = at_work(model)(TOKENS, output_router_logits=True).router_logits
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_router_logits_are_captured_in_a_loaded_model(tmp_path: Path) -> None:
    grafted().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(loaded(TOKENS, output_router_logits=True).router_logits) == 4


def test_the_balance_loss_reaches_the_router() -> None:
    model = grafted().train()
    model.config.output_router_logits = True
    model(TOKENS, labels=TOKENS).aux_loss.backward()
    offsets = [p for name, p in model.named_parameters() if name.endswith(f"{OFFSET}.B")]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in offsets)


def lora(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["router_cell", "gate"],
    )
    return peft.get_peft_model(model, config)


def test_peft_trains_saves_and_reloads_experts_gate_and_cell(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    start = grafted()
    model = lora(copy.deepcopy(start))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for part in (
        "experts.lora_A",
        "router_cell.modules_to_save",
        "projector",
        f"{OFFSET}.B",
        "gate.modules_to_save",
    ):
        assert any(part in name for name in trained), part
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    still = [name for name in trained if torch.equal(trained[name], before[name])]
    assert not still
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        assert not torch.equal(expected, start(TOKENS).logits)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(start), tmp_path).eval()
        assert_same_logits(again(input_ids=TOKENS).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_reloaded(loaded, merged, TOKENS)


def test_a_copy_of_a_gate_brings_no_copy_of_the_model() -> None:
    model = grafted()
    gate = copy.deepcopy(model.model.layers[1].mlp.gate)
    assert gate.owner.backbone is model.model
    assert copy.deepcopy(model).model.layers[1].mlp.gate.owner.backbone is not model.model


def test_auto_wrapping_finds_the_layers_by_their_family_name() -> None:
    from accelerate.utils.dataclasses import get_module_class_from_name

    model = grafted()
    (name,) = model._no_split_modules
    assert isinstance(model.model.layers[0], get_module_class_from_name(model, name))
