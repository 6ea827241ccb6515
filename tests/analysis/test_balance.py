"""The balance audit against losses known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rmoe.analysis.balance import BalanceAudit, audit_balance
from rmoe.moe import routed_layers
from tests.analysis.tiny_families import olmoe_of_equal_routers
from tests.analysis.tiny_rmoe import LAYERS, tiny_rmoe
from tests.graft.tiny_families import tiny_model

BATCHES = list(torch.randint(3, 60, (3, 2, 16), generator=torch.Generator().manual_seed(0)))


def audited(model: nn.Module) -> BalanceAudit:
    found = audit_balance(model.eval(), routed_layers(model), BATCHES)
    assert found is not None
    assert found.tokens == 96
    return found


@pytest.mark.parametrize("router", ["smoe", "rmoe"])
def test_the_loss_of_an_rmoe_is_switchs(router: str) -> None:
    model = tiny_rmoe(router)
    found = audited(model)
    assert found.model == pytest.approx(sum(found.switch) / LAYERS, rel=1e-5)
    assert all(value > 1 for value in found.switch)
    assert all(parameter.grad is None for parameter in model.parameters())
    for batch in BATCHES:
        (model(input_ids=batch, labels=batch).aux_loss / len(BATCHES)).backward()
    want = [sum(float(p.grad.square().sum()) for p in r.parameters()) ** 0.5 for r in model.routers]
    assert found.gradient == pytest.approx(want, rel=1e-4)
    assert min(want) > 0


def test_switchs_loss_by_hand() -> None:
    """Routers of zeros choose evenly likely experts: P is 1 / E whoever is chosen, and the loss 1."""
    model = tiny_rmoe("smoe")
    with torch.no_grad():
        for router in model.routers:
            for parameter in router.parameters():
                parameter.zero_()
    assert audited(model).switch == pytest.approx([1.0] * LAYERS)


def test_olmoe_counts_tokens_and_joins_its_layers() -> None:
    """Equal routers that read the same: then OLMoE's loss is k times Switch's of any layer."""
    model = olmoe_of_equal_routers()
    model.config.output_router_logits = True
    layers = model.model.layers
    found = audited(model)
    k = model.config.num_experts_per_tok
    assert found.switch == pytest.approx([found.switch[0]] * len(layers), rel=1e-5)
    assert found.model == pytest.approx(k * found.switch[0], rel=1e-5)


@pytest.mark.parametrize("name", ["off", "without", "rmoe"])
def test_a_model_without_a_balance_loss_has_none(name: str) -> None:
    if name == "rmoe":
        model = tiny_rmoe("smoe-bias")
    else:
        model = tiny_model("olmoe" if name == "off" else "deepseek_v3")
        model.config.output_router_logits = False
    found = audited(model)
    assert found.model is None
    assert found.gradient is None
    assert all(value > 0 for value in found.switch)


def test_a_loss_that_does_not_reach_a_router_is_seen() -> None:
    model = tiny_rmoe("smoe")
    last = routed_layers(model)[-1].gate  # an earlier one is reached through the routers above it

    def cut_off(module: nn.Module, args: tuple, output: tuple) -> tuple:
        return output[0]._replace(probs=output[0].probs.detach()), output[1]

    last.register_forward_hook(cut_off)
    found = audited(model)
    assert found.gradient is not None
    assert [value > 0 for value in found.gradient] == [True, True, False]
    assert audit_balance(model, routed_layers(model), []) is None
