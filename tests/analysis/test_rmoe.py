"""RMoE models, grafted models: recording, snapshots, and the whole analysis."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.options import MEASURES as ALL
from rmoe.analysis.options import AnalysisOptions
from rmoe.data.blocks import BlockDataset
from rmoe.errors import RequestError, RunError
from rmoe.moe.recorder import Recorder
from rmoe.results.analysis import ModelAnalysis
from rmoe.routing import ZOO
from rmoe.training.evaluation import summarize_routing
from tests.analysis.tiny_families import TINY
from tests.analysis.tiny_rmoe import EXPERTS, LAYERS, TOP_K, tiny_rmoe
from tests.graft.tiny_families import tiny_model
from tests.versions import older


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 256, (7, 24)).astype(np.uint8)


def test_records_are_the_models_own_routing(blocks: np.ndarray) -> None:
    model = tiny_rmoe()
    ids = torch.from_numpy(blocks[:2].astype(np.int64))
    recorder = Recorder(model)
    assert [layer.name for layer in recorder.layers] == [
        f"model.layers.{i}.mlp" for i in range(1, LAYERS + 1)
    ]
    with torch.no_grad():
        routing = model(input_ids=ids, output_routing=True).routing
    for record, expected in zip(recorder(ids), routing, strict=True):
        assert record.num_experts == EXPERTS
        for name in ("logits", "probs", "experts", "weights"):
            assert torch.equal(getattr(record, name), getattr(expected, name))


def test_a_skip_class_of_our_own_is_an_empty_slot(blocks: np.ndarray) -> None:
    model = tiny_rmoe("eda")
    for router in model.routers:
        router.selection_bias.bias[-1] = 0.05  # the skip class, otherwise held back at the start
    record = Recorder(model)(torch.from_numpy(blocks.astype(np.int64)))[0]
    assert record.probs.shape[-1] == EXPERTS + 1
    skipped = record.experts == EXPERTS
    assert skipped.any()
    assert (record.weights[skipped] == 0).all()


@pytest.mark.parametrize(
    "router", ["smoe", "rmoe", "eda", "remoe", "hash", "xmoe", "omni-router", "expert-choice"]
)
def test_every_kind_of_router_can_be_analysed_and_written(router: str, blocks: np.ndarray) -> None:
    options = AnalysisOptions(batch_size=3, gradient_tokens=48, explored_tokens=10)
    (analysis,) = analyze_models([Subject(router, tiny_rmoe(router))], blocks, chr, options)
    again = msgspec.json.decode(msgspec.json.encode(analysis), type=ModelAnalysis)
    assert again == analysis
    assert (analysis.layers, analysis.experts, analysis.experts_per_token) == (LAYERS, EXPERTS, TOP_K)
    assert analysis.frequency_n == analysis.mi_chosen.n == analysis.mi_digitised.n == blocks.size
    assert analysis.tokens is not None
    assert len(analysis.tokens) == 10
    assert (analysis.router_weights is None) == (router == "hash")


@pytest.mark.parametrize("experts", [1, 2])
def test_a_model_without_a_choice_can_be_analysed_and_written(experts: int, blocks: np.ndarray) -> None:
    """Every measure, with as many experts as a token asks."""
    model = tiny_rmoe("smoe", num_experts=experts, num_experts_per_tok=experts)
    options = AnalysisOptions(measures=tuple(ALL), batch_size=4, gradient_tokens=48)
    (analysis,) = analyze_models([Subject("it", model)], blocks, chr, options)
    assert msgspec.json.decode(msgspec.json.encode(analysis), type=ModelAnalysis) == analysis
    assert (analysis.similarity is None) == (experts == 1)
    np.testing.assert_array_equal(analysis.frequency, np.full((LAYERS, experts), 1 / experts))


@pytest.mark.parametrize("router", ["dense", "hash", "switch", "moepp"])
def test_a_router_whose_choice_cannot_be_forced_loses_its_regret_and_says_so(
    router: str, blocks: np.ndarray
) -> None:
    """It ended the whole analysis, which comes last and measures longest."""
    model = tiny_rmoe(router, num_experts_per_tok=ZOO[router].top_k or TOP_K)
    notes: list[str] = []
    options = AnalysisOptions(measures=("load", "regret"), batch_size=4)
    (analysis,) = analyze_models([Subject("it", model)], blocks, chr, options, notes=notes)
    assert analysis.regret is None
    assert analysis.load is not None
    assert [note.partition(":")[0] for note in notes] == ["no regret of it"]


def test_a_layer_with_a_k_of_its_own_is_measured_with_it(blocks: np.ndarray) -> None:
    """1 and 2 in turn: capacity, chance, and which exchange can be made."""
    model = tiny_rmoe("hunyuan")
    recorder = Recorder(model)
    assert [layer.top_k for layer in recorder.layers] == [1, 2, 1]
    options = AnalysisOptions(measures=("load", "predictability", "regret"), batch_size=4)
    (found,) = analyze_models([Subject("it", model)], blocks, chr, options)
    assert found.predictability is not None
    assert found.predictability.chance == [2 / EXPERTS, 1 / EXPERTS]
    assert found.regret is not None
    assert min(found.regret.exchanges) > 50
    experts = torch.stack([r.experts[:, 0] for r in recorder(torch.from_numpy(blocks.astype(np.int64)))])
    counts = [np.bincount(row, minlength=EXPERTS) for row in experts.numpy()]
    capacity = math.ceil(blocks.size / EXPERTS)
    dropped = [np.maximum(row - capacity, 0).sum() / blocks.size for row in counts]
    at_1 = found.drop_ratio.values[found.drop_ratio.capacity_factor.index(1.0)]
    np.testing.assert_allclose([at_1[0], at_1[2]], [dropped[0], dropped[2]])


def test_in_float16_the_balance_loss_has_its_gradient(blocks: np.ndarray) -> None:
    """A mean over tokens of a small loss: its gradients are below float16's smallest number."""
    model = tiny_rmoe("smoe", router_aux_loss_coef=1e-5)
    options = AnalysisOptions(measures=("gradients", "balance"), batch_size=7, gradient_tokens=168)
    full, half = (
        analyze_models([Subject("it", each)], blocks, chr, options)[0]
        for each in (model, copy.deepcopy(model).half())
    )
    for of in (lambda a: a.gradient_split.balance[0], lambda a: a.gradient_split.language_model[0]):
        np.testing.assert_allclose(of(half), of(full), rtol=0.05)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_gradients_sample_does_not_follow_the_batch_size(size: int, blocks: np.ndarray) -> None:
    options = AnalysisOptions(measures=("gradients",), batch_size=size, gradient_tokens=96)
    (analysis,) = analyze_models([Subject("it", tiny_rmoe())], blocks, chr, options)
    assert analysis.gradient_split is not None
    assert analysis.gradient_split.tokens == 96


@pytest.mark.parametrize("family", TINY)
def test_every_transformers_family_can_be_analysed_and_written(family: str, blocks: np.ndarray) -> None:
    options = AnalysisOptions(batch_size=4, gradient_tokens=48)
    (analysis,) = analyze_models([Subject(family, TINY[family].build())], blocks, chr, options)
    assert msgspec.json.decode(msgspec.json.encode(analysis), type=ModelAnalysis) == analysis
    np.testing.assert_allclose(np.sum(analysis.frequency, axis=-1), 1)
    assert analysis.similarity is not None
    assert analysis.gradient_split is not None


def test_no_figure_depends_on_the_batch_size(blocks: np.ndarray) -> None:
    """Expert choice aside, which looks across tokens."""
    one, all_at_once = (
        analyze_models(
            [Subject("m", tiny_rmoe())], blocks, chr, AnalysisOptions(batch_size=size, gradient_tokens=168)
        )
        for size in (1, 7)
    )
    a, b = (msgspec.to_builtins(x[0]) for x in (one, all_at_once))
    assert a["frequency"] == b["frequency"]
    assert a["mi_chosen"] == b["mi_chosen"]
    assert a["drop_ratio"] == b["drop_ratio"]
    assert a["paths"] == b["paths"]
    assert a["top_tokens"] == b["top_tokens"]
    np.testing.assert_allclose(a["mi_digitised"]["values"], b["mi_digitised"]["values"], rtol=1e-3)
    # The balance loss, a product of means over a batch, does depend.
    for part in ("language_model", "recurrent"):
        np.testing.assert_allclose(a["gradient_split"][part], b["gradient_split"][part], rtol=1e-3)


def test_two_checkpoints_are_compared_token_by_token(blocks: np.ndarray) -> None:
    same = tiny_rmoe(seed=0), tiny_rmoe(seed=0)
    (first, _) = analyze_models(
        [Subject("late", same[0], step=20), Subject("early", same[1], step=10)], blocks, chr, stability=True
    )
    assert first.saturation is not None
    assert first.saturation.values == [[1.0] * LAYERS]
    assert (first.saturation.from_step, first.saturation.to_step) == ([10], [20])
    late, early = Subject("late", same[0], step=20, run="a"), Subject("early", same[1], step=10, run="b")
    (apart, _) = analyze_models([late, early], blocks, chr, stability=True)
    assert apart.saturation is not None
    assert (apart.saturation.from_step, apart.saturation.to_step) == ([0], [0])  # no checkpoints of one run
    (other, _) = analyze_models(
        [Subject("a", tiny_rmoe(seed=0)), Subject("b", tiny_rmoe(seed=1))], blocks, chr, stability=True
    )
    assert other.saturation is not None
    assert np.mean(other.saturation.values) == pytest.approx(TOP_K / EXPERTS, abs=0.2)


@pytest.mark.skipif(older("transformers", "5.23"), reason="no looped family")
def test_looped_models_are_compared_pass_by_pass() -> None:
    models = [tiny_model("inkling2_loop_text") for _ in range(2)]
    options = AnalysisOptions(measures=("load",), check=False)
    subjects = [Subject(name, model) for name, model in zip("ab", models, strict=True)]
    blocks = np.random.default_rng(0).integers(1, 60, (2, 8))
    (first, _) = analyze_models(subjects, blocks, chr, options, stability=True)
    records = len(Recorder(models[0])(torch.from_numpy(blocks)))
    assert records > len(Recorder(models[0]).layers)
    assert first.saturation is not None
    assert first.saturation.values == [[1.0] * records]


def test_checkpoints_of_different_shape_have_no_stability(blocks: np.ndarray) -> None:
    with pytest.raises(RequestError, match="compare-with"):
        analyze_models(
            [Subject("a", tiny_rmoe()), Subject("b", TINY["olmoe"].build())], blocks, chr, stability=True
        )


def test_an_id_beyond_the_vocabulary_is_refused(blocks: np.ndarray) -> None:
    with pytest.raises(RequestError, match=r"vocabulary size \(256\)"):
        analyze_models([Subject("a", tiny_rmoe())], blocks.astype(np.int64) + 200, chr)


@pytest.mark.parametrize("check", [True, False])
def test_a_router_that_gives_nan_is_named(check: bool, blocks: np.ndarray) -> None:
    model = tiny_rmoe()
    model.routers[1].scorer.linear.weight.data[0, 0] = math.nan
    name = Recorder(model).layers[1].name
    with pytest.raises(RunError, match=f"^the router of {name} in a gives NaN or infinity; saved: nothing"):
        analyze_models([Subject("a", model)], blocks, chr, AnalysisOptions(check=check))


def test_training_mode_and_router_state_are_left_alone(blocks: np.ndarray) -> None:
    model = tiny_rmoe().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analyze_models([Subject("a", model)], blocks, chr, AnalysisOptions(gradient_tokens=48))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("gated", [True, False])
def test_equal_experts_are_all_alike_and_fresh_ones_as_alike_as_the_reference(
    gated: bool, blocks: np.ndarray
) -> None:
    model = tiny_rmoe(mlp_gated=gated, hidden_size=128, num_experts=8)
    options = AnalysisOptions(gradient_tokens=0)
    (fresh,) = analyze_models([Subject("fresh", model)], blocks, chr, options)
    assert fresh.similarity is not None
    assert fresh.similarity.random_init is not None
    # One draw of the mean over 28 pairs of cosines in 3 * 128 (or 2 * 128) dimensions, three layers.
    assert fresh.similarity.values == pytest.approx(fresh.similarity.random_init, abs=4 / (28 * 256) ** 0.5)
    for layer in Recorder(model).layers:
        for weights in layer.experts.parameters():
            weights.data[:] = weights.data[:1].clone()
    (equal,) = analyze_models([Subject("equal", model)], blocks, chr, options)
    assert equal.similarity is not None
    assert equal.similarity.values == pytest.approx([1.0] * LAYERS)


def test_router_weights_are_those_of_the_scorer(blocks: np.ndarray) -> None:
    model = tiny_rmoe()
    (analysis,) = analyze_models([Subject("a", model)], blocks, chr, AnalysisOptions(gradient_tokens=0))
    matrices = [router.scorer.linear.weight for router in model.routers]
    assert analysis.router_weights is not None
    assert analysis.router_weights.norm == pytest.approx(
        [float(m.detach().norm()) for m in matrices], rel=1e-5
    )
    assert analysis.router_weights.std == pytest.approx(
        [float(m.detach().std(correction=0)) for m in matrices], rel=1e-5
    )
    assert analysis.gradient_split is None


@pytest.mark.parametrize("router", ["rmoe", "eda"])
def test_a_runs_summary_equals_the_whole_analysis(blocks: np.ndarray, tmp_path: Path, router: str) -> None:
    model = tiny_rmoe(router)
    (tmp_path / "text").write_bytes(blocks.tobytes())
    text = BlockDataset(tmp_path / "text", "uint8", 24, whole=True)
    alone = np.stack([text[index]["input_ids"].numpy() for index in range(len(text))])
    (analysis,) = analyze_models([Subject("a", model)], alone, chr, AnalysisOptions(gradient_tokens=0))
    summary = summarize_routing(model, text)
    assert summary.tokens == alone.size
    assert summary.entropy_nats == pytest.approx(analysis.entropy_mean.values, rel=1e-5)
    assert summary.inner_balance == pytest.approx(analysis.inner_balance.values, rel=6e-4)
    assert summary.outer_balance == pytest.approx(analysis.outer_balance.values, abs=2e-4)
    assert summary.load == analysis.frequency
    assert [one.counts for one in summary.entropy_histogram] == analysis.entropy.counts
