"""The split of the router's gradient: its parts add up, and the cut is the detached router's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rmoe.analysis.gradients import find_shared, recurrence_cut, router_gradients
from rmoe.moe.recorder import Recorder
from tests.analysis.tiny_families import TINY
from tests.analysis.tiny_rmoe import LAYERS, tiny_rmoe


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (2, 24), generator=generator) for _ in range(2)]


def _norm(parameters: object) -> float:
    return sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5  # type: ignore[attr-defined]


def _layer_norms(model: torch.nn.Module) -> list[float]:
    return [_norm(router.parameters()) for router in model.routers]  # type: ignore[union-attr]


def test_each_part_is_what_backward_gives_for_that_loss_alone(batches: list[Tensor]) -> None:
    model = tiny_rmoe("rmoe")
    recorder = Recorder(model)
    measured = router_gradients(model, recorder.layers, find_shared(recorder.model, recorder.layers), batches)
    assert measured is not None
    assert measured.tokens == 96
    for part, loss_of in (
        (measured.language_model, lambda o: o.lm_loss),
        (measured.balance, lambda o: o.balance_loss),
    ):
        model.zero_grad()
        for ids in batches:
            (loss_of(model(input_ids=ids, labels=ids)) / len(batches)).backward()
        assert part == [pytest.approx(_layer_norms(model), rel=1e-4)]
    model.zero_grad()
    for ids in batches:
        (model(input_ids=ids, labels=ids).loss / len(batches)).backward()
    assert measured.shared == [
        pytest.approx(_norm(find_shared(recorder.model, recorder.layers).parameters()), rel=1e-4)
    ]


def test_the_cut_gradient_is_that_of_the_detached_router_with_the_same_weights(batches: list[Tensor]) -> None:
    model, detached = tiny_rmoe("rmoe"), tiny_rmoe("rmoe-detach")
    detached.load_state_dict(model.state_dict())
    whole, own = (
        router_gradients(m, Recorder(m).layers, find_shared(m, Recorder(m).layers), batches)
        for m in (model, detached)
    )
    assert whole is not None
    assert own is not None
    assert whole.language_model_cut == [pytest.approx(own.language_model[0], rel=1e-4)]
    assert own.recurrent == [pytest.approx([0.0] * LAYERS)]
    assert whole.recurrent is not None
    (recurrent,), (language_model,) = whole.recurrent, whole.language_model
    assert min(recurrent[:-1]) > 0.01 * max(language_model)
    assert recurrent[-1] == 0  # nothing above the last layer reads its state


def test_the_cut_does_not_change_the_forward_pass(batches: list[Tensor]) -> None:
    model = tiny_rmoe("rmoe")
    before = model(input_ids=batches[0]).logits
    with recurrence_cut(Recorder(model).layers) as found:
        cut = model(input_ids=batches[0]).logits
    assert found
    assert torch.equal(before, cut)
    assert all(not router._forward_pre_hooks for router in model.routers)


def test_a_router_without_memory_has_no_recurrent_part(batches: list[Tensor]) -> None:
    model = tiny_rmoe("smoe")
    recorder = Recorder(model)
    measured = router_gradients(model, recorder.layers, find_shared(recorder.model, recorder.layers), batches)
    assert measured is not None
    assert measured.language_model_cut is measured.recurrent is measured.shared is None


def test_a_frozen_router_has_nothing_to_measure(batches: list[Tensor]) -> None:
    model = tiny_rmoe("random-smoe")
    assert router_gradients(model, Recorder(model).layers, None, batches) is None
    assert router_gradients(tiny_rmoe(), Recorder(tiny_rmoe()).layers, None, []) is None


def test_the_model_is_left_as_it_was(batches: list[Tensor]) -> None:
    model = tiny_rmoe("rmoe")
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    router_gradients(model, Recorder(model).layers, find_shared(model, Recorder(model).layers), batches)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "family", ["olmoe", "mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "phimoe", "jamba"]
)
def test_transformers_balance_loss_is_taken_with_its_weight(family: str, batches: list[Tensor]) -> None:
    model = TINY[family].build()
    recorder = Recorder(model)
    measured = router_gradients(
        model, recorder.layers, find_shared(recorder.model, recorder.layers), batches[:1]
    )
    assert measured is not None
    ids = batches[0]
    balance = model(input_ids=ids, output_router_logits=True).aux_loss
    if isinstance(balance, Tensor):
        (balance * model.config.router_aux_loss_coef).backward()
        norms = [_norm(layer.gate.parameters()) for layer in recorder.layers]
        assert measured.balance == [pytest.approx(norms, rel=1e-4)]
    else:  # Granite in transformers 5.17 returns the number 0
        assert measured.balance is None
    model.zero_grad()
    model(input_ids=ids, labels=ids, output_router_logits=False).loss.backward()
    assert measured.language_model == [
        pytest.approx([_norm(x.gate.parameters()) for x in recorder.layers], rel=1e-3)
    ]


def test_zayas_own_recurrence_is_cut_too(batches: list[Tensor]) -> None:
    recorder = Recorder(TINY["zaya"].build())
    measured = router_gradients(
        recorder.model, recorder.layers, find_shared(recorder.model, recorder.layers), batches
    )
    assert measured is not None
    assert measured.balance is None
    assert measured.recurrent is not None
    (recurrent,) = measured.recurrent
    assert min(recurrent[:-1]) > 0
    assert recurrent[-1] == 0
