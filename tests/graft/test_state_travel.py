"""The router state arrives at the next layer whatever re-runs, nests, compiles, splits or shards the layers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rmoe.graft import GraftedGate, GraftedLayer, RouterStream
from rmoe.graft.attach import CELL
from rmoe.graft.modules import _RIDING, Ride
from tests.graft.conftest import grafted
from tests.graft.tiny_families import TOKENS

FIRST, SECOND = TOKENS, TOKENS.flip(1)


def loss(model: PreTrainedModel, tokens: Tensor = FIRST) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert any(CELL in name and gradient.abs().max() > 0 for name, gradient in one.items())
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0, msg=name)


def nothing_left_on(model: PreTrainedModel) -> bool:
    gates = [module for module in model.modules() if isinstance(module, GraftedGate)]
    empty = all(gate.ride == Ride() for gate in gates)
    return bool(gates) and empty and not _RIDING.states


def test_the_state_matters(model: PreTrainedModel) -> None:
    """If it did not, the tests below could not fail: cut it between two layers, and the outputs change."""
    with torch.no_grad():
        whole = model(FIRST).logits
        layer = model.model.layers[2]
        layer.register_forward_pre_hook(lambda module, args: (RouterStream(args[0].hidden, ()), *args[1:]))
        cut = model(FIRST).logits
    assert not torch.equal(whole, cut)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "qwen2_moe", "jamba", "llama4_text", "gpt_oss"])
def test_gradient_checkpointing(model_type: str) -> None:
    model = grafted(model_type).train()
    loss(model).backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    for layer in model.modules():
        if isinstance(layer, GraftedGate):
            layer.register_forward_hook(lambda *_: runs.append(1))
    value = loss(model)
    forward_runs = len(runs)
    value.backward()
    assert len(runs) == 2 * forward_runs, "nothing was recomputed"
    assert_same(plain, gradients(model))
    assert nothing_left_on(model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-in-first-out", "last-in-first-out"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_a_backward(
    model: PreTrainedModel, checkpointing: bool, order: tuple[int, int]
) -> None:
    model.train()
    alone = []
    for tokens in (FIRST, SECOND):
        loss(model, tokens).backward()
        alone.append(gradients(model))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = [loss(model, FIRST), loss(model, SECOND)]
    for turn in order:
        losses[turn].backward()
        assert_same(alone[turn], gradients(model))


def test_a_call_of_the_model_within_a_call(model: PreTrainedModel) -> None:
    with torch.no_grad():
        expected, inner_expected = model(FIRST).logits, model(SECOND).logits
        inner: list[Tensor] = []

        def call_again(module: Any, args: Any, output: Any) -> None:
            if not inner:
                inner.append(torch.empty(0))  # so that the inner call does not call again
                inner[0] = model(SECOND).logits

        model.model.layers[1].register_forward_hook(call_again)
        assert torch.equal(model(FIRST).logits, expected)
    assert torch.equal(inner[0], inner_expected)


def test_a_call_within_a_layer(model: PreTrainedModel) -> None:
    """Deeper still: between a layer's start and its gate."""
    with torch.no_grad():
        expected = model(FIRST).logits
        busy: list[bool] = []

        def call_again(module: Any, args: Any) -> None:
            if not busy:
                busy.append(True)
                model(SECOND)

        model.model.layers[2].post_attention_layernorm.register_forward_pre_hook(call_again)
        assert torch.equal(model(FIRST).logits, expected)


def test_two_threads_in_one_layer(model: PreTrainedModel) -> None:
    """The main thread is between the layer's start and its gate while the other comes there, and leaves it first."""
    with torch.no_grad():
        expected, other_expected = model(FIRST).logits, model(SECOND).logits
    main, inside, left = threading.get_ident(), threading.Event(), threading.Event()
    found: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(model(SECOND).logits)

    other = threading.Thread(target=call)

    def meet(*_: Any) -> None:
        if threading.get_ident() == main:
            other.start()
            inside.wait(20)
        else:
            inside.set()
            left.wait(20)

    model.model.layers[2].post_attention_layernorm.register_forward_pre_hook(meet)
    try:
        with torch.no_grad():
            found.append(model(FIRST).logits)
    finally:
        left.set()
        other.join()
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], other_expected)
    assert nothing_left_on(model)


def test_recomputation_in_another_thread(model: PreTrainedModel) -> None:
    """As autograd does on a GPU: the forward in one thread, the backward and its recomputation in another."""
    model.train()
    loss(model).backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    value = loss(model)
    empty: list[bool] = []

    def backward() -> None:
        value.backward()
        empty.append(nothing_left_on(model))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert empty == [True]
    assert_same(plain, gradients(model))


def test_a_gate_called_alone_leaves_nothing_behind(model: PreTrainedModel) -> None:
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        gate(torch.ones(3, model.config.hidden_size))
    assert nothing_left_on(model)


def test_generation_step_by_step(model: PreTrainedModel) -> None:
    with torch.no_grad():
        full = model(FIRST).logits
        cache = None
        for position in range(FIRST.shape[1]):
            step = model(FIRST[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            torch.testing.assert_close(step.logits[:, 0], full[:, position], rtol=1e-4, atol=1e-5)


def test_beam_search_reorders_tokens_and_their_state(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    cached, again = (model.generate(FIRST[:, :4], use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, again)


def test_padding_changes_nothing(model: PreTrainedModel) -> None:
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), FIRST), dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    with torch.no_grad():
        alone = model(FIRST).logits
        beside = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


def test_an_exception_leaves_nothing_behind(model: PreTrainedModel) -> None:
    hook = model.model.layers[2].mlp.experts.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(SECOND)
        hook.remove()
        assert nothing_left_on(model)
        assert torch.equal(model(FIRST).logits, copy.deepcopy(model)(FIRST).logits)


def test_copies_are_independent(model: PreTrainedModel) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = twin(FIRST).logits
        for name, parameter in model.named_parameters():
            if CELL in name:
                parameter.zero_()
        assert torch.equal(twin(FIRST).logits, before)
        assert not torch.equal(model(FIRST).logits, before)


def test_a_replica_uses_its_own_cell(model: PreTrainedModel) -> None:
    """What `torch.nn.DataParallel` makes on each device: shallow copies, then parameters of their own."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for original, replica in replicas.items():
        for name, child in original._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in original._parameters.items():
            scale = (
                0.0 if parameter is not None and parameter is getattr(original, "weight_ih", None) else 1.0
            )
            replica._parameters[name] = None if parameter is None else parameter * scale
    with torch.no_grad():
        expected = model(FIRST).logits
        assert not torch.equal(replicas[model](FIRST).logits, expected)
        assert torch.equal(model(FIRST).logits, expected)


def test_a_block_that_bypasses_its_gate_is_noticed(model: PreTrainedModel) -> None:
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: hidden  # as a kernel from the hub replaces the forward
    with pytest.raises(RuntimeError, match="did not call its grafted gate"):
        model(FIRST)


def test_only_routed_layers_and_those_between_carry() -> None:
    model = grafted("deepseek_v3")
    carrying = [isinstance(layer, GraftedLayer) for layer in model.model.layers]
    assert carrying == [False, True, True, True]  # its first layer is dense
    hidden = model(FIRST, output_hidden_states=True).hidden_states
    assert all(isinstance(each, Tensor) for each in hidden)


@pytest.mark.slow
def test_compiled(model: PreTrainedModel) -> None:
    """The whole model in one graph, forward and backward."""
    torch.compiler.reset()
    model.set_experts_implementation("grouped_mm")
    model.train()
    value = loss(model)
    value.backward()
    expected = gradients(model)
    compiled = torch.compile(lambda tokens: loss(model, tokens), fullgraph=True, backend="aot_eager")
    result = compiled(FIRST)
    result.backward()
    torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    assert nothing_left_on(model)
