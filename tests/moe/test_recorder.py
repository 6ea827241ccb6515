"""Each family's record against what its block really computed, found without reading its router's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rmoe.errors import RequestError
from rmoe.moe import Recorder, RoutedLayer, RoutingRecord, expert_matrices, require_layers, scorer_matrix
from rmoe.moe.reading import DenseReader, ExpertsReader
from tests.analysis.tiny_families import COMMON, TINY, TinyFamily


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return TINY[request.param]


@pytest.fixture(scope="module")
def recorder(family: TinyFamily) -> Recorder:
    return Recorder(family.build())


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def recorded(recorder: Recorder, input_ids: Tensor) -> list[tuple[RoutingRecord, RoutedLayer, tuple, dict]]:
    """Record, layer, and the arguments its block was called with, for each layer."""
    calls: list[tuple[tuple, dict]] = []
    blocks = [recorder.model.get_submodule(layer.name) for layer in recorder.layers]

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((tuple(a.clone() if isinstance(a, Tensor) else a for a in args), kwargs))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    records = recorder(input_ids)
    for handle in handles:
        handle.remove()
    return [(r, layer, *call) for r, layer, call in zip(records, recorder.layers, calls, strict=True)]


def _routed_output(recorder: Recorder, layer: RoutedLayer, args: tuple, kwargs: dict) -> Tensor:
    """The block's output, [T, d]."""
    with torch.no_grad():
        output = recorder.model.get_submodule(layer.name)(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(-1, output.shape[-1])


def _without_expert(recorder: Recorder, layer: RoutedLayer, expert: int, args: tuple, kwargs: dict) -> Tensor:
    """The block's output with one expert's down projection (and its bias) set to zero."""
    parameters = [p for name, p in layer.experts.named_parameters() if name.startswith("down_proj")]
    saved = [p.detach()[expert].clone() for p in parameters]
    try:
        for p in parameters:
            p.data[expert] = 0
        return _routed_output(recorder, layer, args, kwargs)
    finally:
        for p, values in zip(parameters, saved, strict=True):
            p.data[expert] = values


def test_sizes(recorder: Recorder, family: TinyFamily, recorded: Any) -> None:
    assert len(recorder.layers) == family.layers
    for record, *_ in recorded:
        assert record.num_experts == family.experts
        assert record.experts.shape == record.weights.shape == (48, family.top_k)
        assert record.probs.shape == record.logits.shape == (48, family.classes)
        torch.testing.assert_close(record.probs.sum(-1), torch.ones(48))


def test_the_recorded_experts_are_those_that_ran_with_the_recorded_weights(
    recorder: Recorder, recorded: Any, family: TinyFamily
) -> None:
    """Zero an expert's output matrix: what changes is `w_e f_e(x)`, at the tokens recorded for it and no others."""
    for record, layer, args, kwargs in recorded:
        full = _routed_output(recorder, layer, args, kwargs)
        hidden = args[0].reshape(-1, args[0].shape[-1])
        for expert in range(record.num_experts):
            difference = full - _without_expert(recorder, layer, expert, args, kwargs)
            is_chosen = record.experts == expert  # [T, K]
            ran = difference.abs().amax(-1) > 1e-9
            assert torch.equal(ran, is_chosen.any(-1))
            weight = (record.weights * is_chosen).sum(-1, keepdim=True)
            if isinstance(layer.reader, DenseReader):  # Llama 4 scales the input
                expected = _expert_alone(layer, expert, hidden * weight)
            else:
                expected = _expert_alone(layer, expert, hidden) * weight
            torch.testing.assert_close(difference[ran], expected[ran], atol=1e-6, rtol=1e-3)


def _expert_alone(layer: RoutedLayer, expert: int, hidden: Tensor) -> Tensor:
    """f_e(x) of every token, [T, d], from the experts' weights alone."""
    with torch.no_grad():
        if isinstance(layer.reader, DenseReader):
            everything = layer.experts(hidden.repeat(layer.num_experts, 1))
            return everything.view(layer.num_experts, -1, hidden.shape[-1])[expert]
        index = torch.full((len(hidden), 1), expert)
        return layer.experts(hidden, index, torch.ones(len(hidden), 1))


def test_probabilities_are_those_of_the_scores(recorded: Any, family: TinyFamily) -> None:
    for record, layer, args, _kwargs in recorded:
        if family.name == "zaya":
            continue  # its logits depend on the layer below: see the test that follows
        hidden = args[0].reshape(-1, args[0].shape[-1]).detach()
        bias = getattr(layer.gate, "bias", None)
        logits = hidden @ scorer_matrix(layer, None).T + (0 if bias is None else bias.detach())
        torch.testing.assert_close(record.logits, logits, atol=1e-5, rtol=1e-4)
        scores = 1 / (1 + (-logits).exp()) if family.name in ("deepseek_v3", "llama4") else logits.exp()
        torch.testing.assert_close(record.probs, scores / scores.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_zaya_skips_are_shown_and_its_state_is_in_the_logits(input_ids: Tensor) -> None:
    recorder = Recorder(TINY["zaya"].build())
    heads: list[Tensor] = []
    for layer in recorder.layers:
        layer.gate.get_submodule("router_mlp.out_proj").register_forward_hook(
            lambda module, args, output: heads.append(output.reshape(-1, output.shape[-1]))
        )
    for record, logits, layer in zip(recorder(input_ids), heads, recorder.layers, strict=True):
        assert torch.equal(record.logits, logits)
        biased = logits.softmax(-1) + layer.gate.balancing_biases
        assert torch.equal(record.experts[:, 0], biased.argmax(-1))  # class E, the skip, is the empty slot
        skipped = record.experts == record.num_experts
        assert skipped.any()
        assert (record.weights[skipped] == 0).all()


def test_padding_is_left_out(recorder: Recorder, input_ids: Tensor) -> None:
    padded = torch.cat([input_ids, torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    mask = (torch.arange(29) < 24).long().expand(2, -1)
    for record, alone in zip(recorder(padded, mask), recorder(input_ids), strict=True):
        torch.testing.assert_close(record.probs, alone.probs, atol=1e-5, rtol=1e-4)
        assert torch.equal(record.experts, alone.experts)


def test_recording_leaves_the_model_as_it_was(recorder: Recorder, recorded: Any) -> None:
    assert all(not layer.gate._forward_hooks for layer in recorder.layers)
    assert all(not layer.experts._forward_pre_hooks for layer in recorder.layers)


def test_expert_matrices_are_aligned_by_hidden_unit(recorder: Recorder) -> None:
    """Zeroing row j of the gate matrix silences hidden unit j, as zeroing row j of the down matrix does."""
    layer = recorder.layers[0]
    gate, up, down = expert_matrices(layer)  # views of the parameters
    assert gate.shape == up.shape == down.shape
    assert gate.shape[2] == COMMON["hidden_size"]
    x = torch.randn(5, COMMON["hidden_size"], generator=torch.Generator().manual_seed(2))
    for unit in (0, 3):
        outputs = []
        for row in (gate[1, unit], down[1, unit]):
            saved = row.clone()
            row.zero_()
            outputs.append(_expert_alone(layer, 1, x))
            row.copy_(saved)
        assert (outputs[0] - _expert_alone(layer, 1, x)).abs().max() > 1e-7
        torch.testing.assert_close(*outputs, atol=1e-7, rtol=1e-4)


def test_a_dense_model_is_refused_in_one_line() -> None:
    model = LlamaForCausalLM(LlamaConfig(**COMMON))
    with pytest.raises(RequestError, match="a model with MoE layers") as refusal:
        require_layers(model)
    assert "\n" not in str(refusal.value)


def test_weights_below_float16s_normal_numbers_do_not_refuse_a_model() -> None:
    """6.8e-8 is kept as 6.0e-8 there, which no function of the logits gives."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, -16.5, -30.0, -30.0]])
    weights, experts = logits.softmax(-1).half().topk(2)
    given = (torch.zeros(2, 8), experts, weights)
    record = ExpertsReader("mlp", 4, 2).read(logits, given, {})
    torch.testing.assert_close(record.probs, logits.softmax(-1))
    with pytest.raises(RequestError, match="the nearest is off"):
        ExpertsReader("mlp", 4, 2).read(logits, (*given[:2], weights * torch.tensor([0.5, 1.0])), {})
