"""The check finds a wrong reading, and passes a right one; layers of different sizes are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import AnalysisOptions
from rmoe.errors import RequestError
from rmoe.graft import graft
from rmoe.model import RMoEConfig, RMoEForCausalLM
from rmoe.model.layers import RMoESparseMoeBlock
from rmoe.moe import Recorder, check_reading, routed_layers
from rmoe.moe.reading import ExpertsReader
from tests.analysis.tiny_rmoe import tiny_rmoe
from tests.graft.conftest import SPEC, at_work
from tests.graft.tiny_families import tiny_model
from tests.versions import older, since

OLD = older("transformers", "5.23")  # families it lacks, or whose routers give no logits there

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
CHECKED = (
    "olmoe",
    "llama4_text",
    "zaya",
    *([] if OLD else ["longcat_flash"]),
    "gemma4_text",
    *([] if OLD else ["switch_transformers", "inkling2_loop_text"]),
)


@pytest.mark.parametrize("name", [*CHECKED, "rmoe", "default outputs", "graft"])
def test_a_right_reading_passes(name: str) -> None:
    if name == "rmoe":
        model: Any = tiny_rmoe("rmoe")
    elif name == "default outputs":
        model = tiny_rmoe("rmoe", dense_gradients="default")
    else:
        model = tiny_model("qwen3_moe" if name == "graft" else name)
    if name == "graft":
        model = at_work(graft(model, SPEC)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check = check_reading(model, IDS)
    assert check.passed
    assert check.summary.startswith("passed: ")
    assert {one.layer for one in check.experts} == {layer.name for layer in routed_layers(model)}
    assert all(one.missed == one.extra == 0 for one in check.experts)
    assert all((one.change > 0) == (one.said > 0) for one in check.experts)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_not_called_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that goes around its block's call cannot be run again in its place."""
    model = tiny_rmoe("smoe")
    monkeypatch.setattr(RMoESparseMoeBlock, "__call__", RMoESparseMoeBlock.forward)
    check = check_reading(model, IDS)
    assert not check.passed
    assert "is not called" in check.summary


def test_a_wrong_reading_is_found_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts read one slot off: analysis refuses the model with what was found."""
    model = tiny_model("olmoe")
    plain = ExpertsReader.choice

    def shifted(self: ExpertsReader, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        experts, weights = plain(self, args, kwargs)
        return (experts + 1) % self.num_experts, weights

    monkeypatch.setattr(ExpertsReader, "choice", shifted)
    monkeypatch.setattr(ExpertsReader, "_find_scoring", lambda *args: "softmax")
    check = check_reading(model, IDS)
    assert not check.passed
    assert check.summary.startswith("failed: 12 experts of 4 layers")
    blocks = IDS.numpy()
    with pytest.raises(RequestError, match="the check failed"):
        analyze_models([Subject("a", model)], blocks, str)
    (unchecked,) = analyze_models([Subject("a", model)], blocks, str, AnalysisOptions(check=False))
    assert unchecked.check is None


def test_layers_of_different_sizes_are_measured_each_by_its_own() -> None:
    model = tiny_model("hunyuan_v1_moe")
    other = tiny_model("hunyuan_v1_moe", seed=1)
    layer = routed_layers(model)[1]
    block = model.get_submodule(layer.name)
    with torch.no_grad():  # layer 1: four of its eight experts, one a token
        layer.experts.gate_up_proj = torch.nn.Parameter(layer.experts.gate_up_proj[:4].clone())
        layer.experts.down_proj = torch.nn.Parameter(layer.experts.down_proj[:4].clone())
        for parameter in layer.gate.parameters():
            parameter.data = parameter.data[:4].clone()
    for part in (block, layer.gate, layer.experts):
        for name, value in (("num_experts", 4), ("top_k", 1)):
            if hasattr(part, name):
                setattr(part, name, value)
    sizes = [(one.num_experts, one.top_k) for one in routed_layers(model)]
    assert sizes == [(8, 2), (4, 1), (8, 2), (8, 2)]
    batch = Recorder(model).batch(IDS)
    assert batch.layer_experts == (8, 4, 8, 8)
    assert (batch.experts[1, :, 0] < 4).all()
    assert (batch.experts[1, :, 1] == 8).all()
    torch.testing.assert_close(batch.probs.sum(-1), torch.ones(4, 32))
    assert check_reading(model, IDS, per_layer=8).passed
    (found,) = analyze_models([Subject("a", model)], IDS.numpy(), str, AnalysisOptions(gradient_tokens=0))
    counts = np.bincount(batch.experts[1, :, 0].numpy(), minlength=8)
    assert found.load_imbalance.values[1] == pytest.approx(counts.max() / counts.sum() * 4)
    assert found.check is not None
    assert found.check.passed
    assert len(routed_layers(other)) == 4


@since("transformers", "5.23", "its looped family is newer, and Switch's router gives no logits")
def test_an_encoder_decoder_is_two_stacks_and_a_loop_counts_its_passes() -> None:
    switch = tiny_model("switch_transformers")
    assert list({layer.stack: 1 for layer in routed_layers(switch)}) == ["encoder.block", "decoder.block"]
    (found,) = analyze_models([Subject("a", switch)], IDS.numpy(), str)
    assert found.layers == len(routed_layers(switch)) == len(found.layer_names)
    loop = tiny_model("inkling2_loop_text")
    recorder = Recorder(loop)
    records = recorder(IDS)
    assert len(records) > len(recorder.layers)
    assert (
        recorder.names.count("layers.1.mlp (pass 2)") + recorder.names.count("model.layers.1.mlp (pass 2)")
        == 1
    )


def test_a_token_whose_output_is_nothing_has_no_share_of_it() -> None:
    """ReLU experts without a gate give 0 where all their units are dead."""
    for seed in range(6):
        torch.manual_seed(seed)
        config = RMoEConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_experts=4, num_experts_per_tok=1,
            moe_intermediate_size=6, hidden_act="relu", mlp_gated=False, router="smoe",
        )  # fmt: skip
        check = check_reading(RMoEForCausalLM(config).eval(), torch.randint(0, 64, (1, 64)))
        assert all(np.isfinite(one.change) for one in check.experts)
