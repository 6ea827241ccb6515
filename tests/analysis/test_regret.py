"""The regret of a route against an exchange made by hand, and where it must be nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rmoe.analysis.regret import RouteRegret
from rmoe.moe import Recorder, routed_layers
from tests.analysis.tiny_rmoe import tiny_rmoe
from tests.graft.tiny_families import tiny_model

IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def losses(model: nn.Module) -> Tensor:
    return cross_entropy(model(input_ids=IDS).logits[0, :-1].double(), IDS[0, 1:], reduction="none")


def test_against_an_exchange_by_hand_in_the_last_layer() -> None:
    """No layer above: the ids and weights that its experts are given are all that has to be changed."""
    model = tiny_model("olmoe").eval()
    own, later = RouteRegret(model, tokens=11, rows=4, seed=2)(IDS)
    assert own.shape == later.shape == (len(routed_layers(model)), 11)
    positions = torch.randperm(11, generator=torch.Generator().manual_seed(2)).tolist()
    before = losses(model)
    one, layer = Recorder(model)(IDS)[-1], routed_layers(model)[-1]
    k = one.experts.shape[1]
    for at, position in enumerate(positions):
        ranked = one.probs[position].argsort(descending=True)

        def exchange(module: nn.Module, args: Any, position: int = position, ranked: Tensor = ranked) -> Any:
            hidden, ids, weights = args
            ids, weights = ids.clone(), weights.clone()
            slot = int((ids[position] == ranked[k - 1]).nonzero())
            ids[position, slot] = ranked[k]
            chosen = one.probs[position, ids[position]]
            weights[position] = chosen / chosen.sum() if model.config.norm_topk_prob else chosen
            return hidden, ids, weights

        handle = layer.experts.register_forward_pre_hook(exchange)
        change = losses(model) - before
        handle.remove()
        assert float(own[-1, at]) == pytest.approx(float(change[position]), abs=2e-6)
        assert float(later[-1, at]) == pytest.approx(0, abs=1e-5)  # later tokens do not see the last layer
    assert own[-1].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["rmoe", "mixtral"])
def test_equal_experts_leave_nothing_to_regret(name: str) -> None:
    """The weights of both sum to one, so whoever is chosen, the output is the same."""
    model = (tiny_rmoe("smoe-topk-softmax") if name == "rmoe" else tiny_model(name)).eval()
    unequal, _ = RouteRegret(model, tokens=5, rows=3)(IDS)
    with torch.no_grad():
        for layer in routed_layers(model):
            for weight in layer.experts.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    own, later = RouteRegret(model, tokens=5, rows=3)(IDS)
    assert own.isfinite().all()
    assert own.abs().max() < 1e-5
    assert later.abs().max() < 1e-4
    assert unequal.abs().max() > 10 * own.abs().max()


def test_a_token_that_has_all_experts_has_no_exchange() -> None:
    model = tiny_rmoe("smoe", num_experts_per_tok=4)
    own, later = RouteRegret(model, tokens=5, rows=3)(IDS)
    assert own.isnan().all()
    assert later.isnan().all()
