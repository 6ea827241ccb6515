"""The newer measures against values known beforehand or computed one token at a time."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.contexts import TopContexts
from rmoe.analysis.insight import Predictability, Saliency
from rmoe.analysis.load import coverage, dead_experts, hottest_steps, max_violation, relative_load_quantiles
from rmoe.analysis.options import MEASURES, AnalysisOptions
from rmoe.analysis.probe import RIDGE, ChoiceProbe, top_k_recall
from rmoe.analysis.saturation import Saturation
from rmoe.cli.main import main
from rmoe.moe import Recorder
from rmoe.results import analysis as schema
from rmoe.results.analysis import read_analysis
from tests.analysis.random_routing import random_routing, split
from tests.analysis.tiny_families import olmoe_of_equal_routers
from tests.analysis.tiny_rmoe import TOP_K, tiny_rmoe
from tests.graft.conftest import grafted
from tests.graft.tiny_families import tiny_model

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))


def test_spread_of_loads() -> None:
    counts = np.array([[10, 0, 30, 0, 60], [20, 20, 20, 20, 20]])
    expected = [[0, 0, 0.5, 2.7, 3], [1, 1, 1, 1, 1]]  # the 95th percentile: 1.5 + 0.8 * (3 - 1.5)
    np.testing.assert_allclose(relative_load_quantiles(counts), expected)
    np.testing.assert_allclose(max_violation(counts), [2, 0], atol=1e-12)
    fewer = np.array([[10, 0, 30, 0, 0], [20, 20, 20, 20, 20]])  # the first layer has four experts
    np.testing.assert_allclose(relative_load_quantiles(fewer, (4, 5))[0], [0, 0, 0.5, 2.7, 3])
    assert dead_experts(fewer, (4, 5)).tolist() == [2, 0]
    assert dead_experts(counts).tolist() == [2, 0]
    np.testing.assert_allclose(max_violation(fewer, (4, 5)), [2, 0], atol=1e-12)
    assert hottest_steps(5) == [1, 2, 4, 5]
    assert hottest_steps(4) == [1, 2, 4]
    assert hottest_steps(1) == [1]
    np.testing.assert_allclose(coverage(counts, [1, 2, 4, 5]), [[0.6, 0.9, 1, 1], [0.2, 0.4, 0.8, 1]])


def test_flips_by_token_and_layer() -> None:
    one = torch.tensor([[[0, 1], [2, 3], [0, 4]], [[1, 2], [1, 2], [1, 2]]])  # [L, T, K], E = 4
    other = torch.tensor([[[1, 0], [2, 1], [0, 4]], [[2, 1], [1, 2], [1, 3]]])
    flips = Saturation(2)
    flips.update(one[:, :1], other[:, :1], 4)
    flips.update(one[:, 1:], other[:, 1:], 4)
    by_layer, anywhere = flips.flips()
    np.testing.assert_allclose(by_layer, [1 / 3, 1 / 3])  # the order of two experts is no difference
    assert anywhere == pytest.approx(2 / 3)
    alone = Saturation(2)
    alone.update(one[:, 1:2], other[:, 1:2], 4)
    assert alone.flips()[1] == 1


def test_contexts_against_sorting() -> None:
    layers, tokens, experts, k, count = 2, 300, 6, 2, 8
    batch = random_routing(layers, tokens, experts, k, seed=3)
    chosen = batch.experts.clone()
    chosen[:, ::5, 1] = experts
    batch = batch._replace(experts=chosen)
    measure = TopContexts(layers, experts, count)
    for part in split(batch, [7, 200, 93]):
        measure.update(part)
    positions, weights = measure.result()
    for layer in range(layers):
        for expert in range(experts):
            uses = [
                (-float(batch.weights[layer, t, slot]), t)
                for t in range(tokens)
                for slot in range(k)
                if chosen[layer, t, slot] == expert
            ]
            best = sorted(uses)[:count]
            assert positions[layer, expert].tolist() == [t for _, t in best]
            np.testing.assert_allclose(weights[layer, expert], [-w for w, _ in best])


def test_an_expert_with_few_tokens_has_few_contexts() -> None:
    batch = random_routing(1, 3, 4, 1, seed=0)
    batch = batch._replace(
        experts=torch.tensor([[[2], [4], [2]]]), weights=torch.tensor([[[0.2], [0.0], [0.9]]])
    )
    measure = TopContexts(1, 4, 3)
    measure.update(batch)
    positions, weights = measure.result()
    assert positions[0].tolist() == [[-1] * 3, [-1] * 3, [2, 0, -1], [-1] * 3]
    np.testing.assert_allclose(weights[0, 2], [0.9, 0.2, 0])


def test_recall() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [9, 8, 1, 0]])
    chosen = torch.tensor([[0, 3], [3, 4], [4, 4]])  # one hit of two; one of one; a token without experts
    assert top_k_recall(scores, chosen, 2) == (1.5, 2)


def test_predictability_of_a_router_that_sees_the_same_input() -> None:
    """With layers that add nothing and equal routers, the input below tells all; a reversed router is told wrongly."""
    model = olmoe_of_equal_routers().eval()
    layers = model.model.layers
    assert _recall(model) == ([1.0] * 3, [1.0] * 3)
    with torch.no_grad():
        layers[2].mlp.gate.weight.copy_(-layers[0].mlp.gate.weight)
    below, own = _recall(model)
    assert own == [1.0] * 3
    assert below == [1.0] * 3  # the matrix of layer 2 is applied to the same input: what matters is the input
    with torch.no_grad():
        layers[1].post_attention_layernorm.weight.neg_()
    below, own = _recall(model)
    assert own == [1.0] * 3
    assert max(below[0], below[1]) < 0.2  # and now the input below is the opposite
    assert below[2] == 1.0


def _recall(model: torch.nn.Module) -> tuple[list[float | None], list[float | None]]:
    recorder = Recorder(model)
    measure = Predictability(recorder.layers, None, fit_tokens=0)
    with measure.listening():
        batch = recorder.batch(IDS)
    measure.update(batch)
    assert measure.n == IDS.numel()
    found = measure.result()
    return found.own_router, found.at_its_own_input


def test_a_probe_finds_what_is_linear_and_nothing_in_noise() -> None:
    """Features that give one expert each determine the choice; independent ones find k of E by chance."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, k = 20_000, 8, 2
    chosen = torch.rand(tokens, experts, generator=generator).topk(k, -1).indices
    told = torch.zeros(tokens, experts).scatter_(1, chosen, 1.0)
    turned = told @ torch.randn(experts, experts, generator=generator) + 5.0
    noise = torch.randn(tokens, experts, generator=generator)
    probe = ChoiceProbe([(experts, k)] * 3, fit_tokens=tokens // 2)
    for part in torch.arange(tokens).split(3_001):  # a batch has tokens of both halves
        probe.update([turned[part], noise[part], None], [chosen[part]] * 3)
    linear, independent, absent = probe.result()
    assert linear == 1.0
    assert independent == pytest.approx(k / experts, abs=0.015)  # five standard errors
    assert absent is None


def test_a_probe_against_ridge_regression_in_one_piece() -> None:
    generator = torch.Generator().manual_seed(1)
    x, experts = torch.randn(400, 5, generator=generator) + 2, 6
    chosen = (
        (x @ torch.randn(5, experts, generator=generator) + torch.randn(400, experts)).topk(2, -1).indices
    )
    chosen[::7, 1] = experts  # an empty slot
    probe = ChoiceProbe([(experts, 2)], fit_tokens=300)
    for part in torch.arange(400).split(90):
        probe.update([x[part]], [chosen[part]])
    a, b = x[:300].double().numpy(), np.zeros((300, experts))
    for token, slots in enumerate(chosen[:300].tolist()):
        b[token, [e for e in slots if e < experts]] = 1
    centred, wanted = a - a.mean(0), b - b.mean(0)
    square = centred.T @ centred
    weights = np.linalg.solve(square + RIDGE * np.trace(square) / 5 * np.eye(5), centred.T @ wanted)
    scores = (x[300:].double().numpy() - a.mean(0)) @ weights + b.mean(0)
    shares = [
        len({*np.argsort(-row)[:2]} & {e for e in slots if e < experts}) / sum(e < experts for e in slots)
        for row, slots in zip(scores, chosen[300:].tolist(), strict=True)
    ]
    assert probe.result() == [pytest.approx(np.mean(shares), abs=1e-12)]


@pytest.mark.parametrize("name", ["rmoe", "graft", "smoe", "olmoe"])
def test_the_probes_read_the_input_and_the_state_of_the_layer_below(name: str) -> None:
    """Layer by layer against probes of what `Recorder` and the modules' own calls give."""
    model = {
        "rmoe": tiny_rmoe,
        "smoe": lambda: tiny_rmoe("smoe"),
        "graft": grafted,
        "olmoe": lambda: tiny_model("olmoe"),
    }[name]().eval()
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(4))
    recorder = Recorder(model)
    layers = recorder.layers
    measure = Predictability(layers, None, fit_tokens=64)
    read: list[torch.Tensor] = []
    handles = [
        layer.gate.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, -2)))
        for layer in layers
    ]
    with torch.no_grad():
        records = recorder(ids)
        inputs = list(read)
        with measure.listening():
            batch = recorder.batch(ids)
    for handle in handles:
        handle.remove()
    measure.update(batch)
    sizes = [(layer.num_experts, layer.top_k) for layer in layers[1:]]
    want = ChoiceProbe(sizes, 64)
    want.update(inputs[:-1], [record.experts for record in records[1:]])
    found = measure.result()
    linear, state = found.probe, found.state_probe
    assert linear == want.result()
    assert state is not None
    assert [one is not None for one in state] == [name in ("rmoe", "graft")] * (len(layers) - 1)
    assert state != linear


def test_a_router_that_peft_trains_whole_is_measured_as_itself() -> None:
    """Its matrix, its state and what the state adds to the logits."""
    peft = pytest.importorskip("peft")
    ids = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    options = AnalysisOptions(measures=("predictability", "contributions"))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["gate"])
    plain, wrapped = tiny_rmoe(), peft.get_peft_model(tiny_rmoe(), settings).eval()
    one, two = (
        analyze_models([Subject("it", model)], ids.numpy(), str, options)[0] for model in (plain, wrapped)
    )
    assert one.predictability is not None
    assert None not in (one.predictability.state_probe or [None])
    assert one.predictability == two.predictability
    assert one.contributions == two.contributions
    assert one.contributions is not None
    assert None not in one.contributions.state[1:]


def test_a_wrapped_model_has_its_own_number_of_experts() -> None:
    """The row `dense` has fewer matrices than experts; behind PEFT too its configuration says how many."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    plain, wrapped = tiny_rmoe("dense"), peft.get_peft_model(tiny_rmoe("dense"), settings)
    assert Recorder(wrapped).num_experts == Recorder(plain).num_experts == plain.config.num_experts


def test_probes_in_the_file() -> None:
    ids = torch.randint(3, 60, (16, 16), generator=torch.Generator().manual_seed(5)).numpy()
    options = AnalysisOptions(batch_size=3, measures=("predictability",))
    (found,) = analyze_models([Subject("m", tiny_rmoe())], ids, str, options)
    p = found.predictability
    assert p is not None
    assert p.own_router == [None] * len(p.chance)  # RMoE's routers read more than the hidden state
    for values in (p.probe, p.state_probe):
        assert values is not None
        assert len(values) == len(p.chance)
        assert all(value is not None and TOP_K / 4 * 0.5 < value <= 1 for value in values)
    old = msgspec.to_builtins(p)
    del old["probe"], old["state_probe"]
    assert msgspec.convert(old, schema.Predictability) == msgspec.structs.replace(
        p, probe=None, state_probe=None
    )


@pytest.mark.parametrize(
    ("family", "ours"),
    [
        *((family, False) for family in ("olmoe", "deepseek_v3", "gpt_oss")),
        *((router, True) for router in ("rmoe", "top-p", "smoe-capacity", "longcat")),
    ],
)
def test_saliency_against_a_loop_over_tokens(family: str, ours: bool) -> None:
    """REAP's figure from an expert alone: its output is read off the experts with one slot and one token."""
    model = tiny_rmoe(family) if ours else tiny_model(family).eval()
    recorder = Recorder(model)
    layer = recorder.layers[0]
    heard: list[tuple[torch.Tensor, ...]] = []
    handle = layer.experts.register_forward_pre_hook(
        lambda m, args, kwargs: heard.append((*args, *kwargs.values())), with_kwargs=True
    )
    measure = Saliency(recorder.layers)
    with measure.listening():
        records = recorder(IDS)
    handle.remove()
    hidden, chosen, weights = heard[0]
    expected = np.full(layer.num_experts, np.nan)
    for expert in range(layer.num_experts):
        values = [
            float(weights[t, s])
            * float(
                layer.experts(hidden[t : t + 1], chosen[t : t + 1, s : s + 1], torch.ones(1, 1))
                .detach()
                .norm()
            )
            for t in range(len(hidden))
            for s in range(chosen.shape[1])
            if chosen[t, s] == expert
        ]
        if values:
            expected[expert] = np.mean(values)
    np.testing.assert_allclose(measure.result()[0].detach(), expected, rtol=1e-5)
    for record, again in zip(records, recorder(IDS), strict=True):
        assert torch.equal(record.experts, again.experts)  # the extra runs change nothing


def test_saliency_by_hand() -> None:
    """An expert that gives a constant: its saliency is the mean weight times the constant's norm."""
    model = tiny_model("gpt_oss").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.experts.down_proj_bias.fill_(2.0)
    recorder = Recorder(model)
    measure = Saliency(recorder.layers)
    with measure.listening():
        record = recorder(IDS)[1]
    for expert in range(recorder.num_experts):
        used = record.weights[record.experts == expert]
        if len(used):
            expected = float(used.mean()) * 2 * model.config.hidden_size**0.5
            assert float(measure.result()[1, expert]) == pytest.approx(expected, rel=1e-5)


FIELDS = {
    "load": ("frequency", "load", "coverage", "drop_ratio"),
    "coactivation": ("coactivation",),
    "paths": ("paths",),
    "mutual-information": ("mi_digitised", "mi_chosen"),
    "confidence": ("entropy", "inner_balance"),
    "tokens": ("tokens", "top_tokens"),
    "contexts": ("contexts",),
    "weights": ("similarity", "router_weights"),
    "gradients": ("gradient_split",),
    "predictability": ("predictability",),
    "saliency": ("saliency",),
    "balance": ("balance",),
    "regret": ("regret",),
    "contributions": ("contributions",),
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_asked_for_is_measured_and_nothing_else(name: str) -> None:
    options = AnalysisOptions(batch_size=2, gradient_tokens=16, measures=(name,))
    (found,) = analyze_models([Subject("m", tiny_model("olmoe"))], IDS.numpy(), str, options)
    for other, fields in FIELDS.items():
        for field in fields:
            assert (getattr(found, field) is not None) == (other == name), field


def test_contexts_in_the_file_point_into_the_text() -> None:
    options = AnalysisOptions(batch_size=1, gradient_tokens=0, measures=("contexts",))
    (found,) = analyze_models([Subject("m", tiny_model("olmoe"))], IDS.numpy(), "<{}>".format, options)
    assert found.contexts is not None
    assert [found.contexts.vocabulary[i] for i in found.contexts.text] == [
        f"<{i}>" for i in IDS.flatten().tolist()
    ]
    positions = np.array(found.contexts.positions)
    assert positions.shape == np.shape(found.contexts.weights) == (4, 8, 8)
    record = Recorder(tiny_model("olmoe").eval())(IDS)[1]
    used = (record.experts == 3).any(-1).nonzero().flatten().tolist()
    assert set(positions[1, 3][positions[1, 3] >= 0].tolist()) <= set(used)
    assert len(used) > 0


def test_flips_between_precisions_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = tmp_path / "m", tmp_path / "t.txt"
    config = tiny_model("olmoe").config
    config.vocab_size = 256
    type(tiny_model("olmoe"))(config).save_pretrained(model)
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    given = ["analyze", str(model), "--compare-with", str(model), "--data", str(text), "--tokens", "512"]
    given += ["--sequence-length", "32", "--measures", "load,confidence", "--out"]
    assert main([*given, str(tmp_path / "same")]) == 0
    assert main([*given, str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    same, rounded = (
        read_analysis(tmp_path / name / "analysis.json").models[0].flips for name in ("same", "bf16")
    )
    assert same is not None
    assert rounded is not None
    assert same.any_layer == 0
    assert 0 < max(rounded.values) <= rounded.any_layer < 1
    assert rounded.n == 512
    capsys.readouterr()
    assert main([*given[:-1], "--measures", "load,nonesuch", "--out", str(tmp_path / "x")]) == 2
    assert "--measures is 'nonesuch'; allowed: load, coactivation" in capsys.readouterr().err


def test_all_measures_from_the_command_line(tmp_path: Path) -> None:
    model, text = tmp_path / "m", tmp_path / "t.txt"
    config = tiny_model("olmoe").config
    config.vocab_size = 256
    type(tiny_model("olmoe"))(config).save_pretrained(model)
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    given = ["analyze", str(model), "--data", str(text), "--tokens", "256", "--sequence-length", "32"]
    assert main([*given, "--measures", "all", "--out", str(tmp_path / "all")]) == 0
    measured = read_analysis(tmp_path / "all" / "analysis.json").models[0]
    two_models_or_runs = {"flips", "saturation"}
    absent = {name for name in measured.__struct_fields__ if getattr(measured, name) is None}
    assert absent == two_models_or_runs
