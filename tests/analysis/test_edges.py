"""Where a measure's ordinary input does not lead: tables of several, single batches, empty slots, low precision."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmoe.analysis import measures, mutual_information
from rmoe.analysis.analyze import Subject, analyze_models
from rmoe.analysis.command import _sequence_length
from rmoe.analysis.gradients import (
    _only_trainable,
    balance_loss,
    find_shared,
    recurrence_cut,
    router_gradients,
)
from rmoe.analysis.load import Load
from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.analysis.mutual_information import (
    ChosenMutualInformation,
    entropy_of_counts,
    mutual_information_of_counts,
)
from rmoe.analysis.options import AnalysisOptions
from rmoe.analysis.paths import FrequentPaths
from rmoe.analysis.weights import random_similarity
from rmoe.errors import RequestError
from rmoe.moe import Recorder, RoutedLayer, expert_vectors, require_layers
from rmoe.moe.reading import ExpertsReader
from rmoe.moe.records import RoutingBatch
from tests.analysis.random_routing import random_routing
from tests.analysis.tiny_rmoe import tiny_rmoe


def entropy(counts: list[float]) -> float:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c)


def test_information_of_many_tables_with_its_correction() -> None:
    """`H + (cells in use - 1) / 2n` of rows, columns and pairs, by hand, tables stacked; a table may be oblong."""
    rng = np.random.default_rng(0)
    tables = rng.integers(0, 5, (2, 3, 4, 6)).astype(np.float64)
    tables[..., 0, :] = 0
    tables[..., 2] = 0
    found = mutual_information_of_counts(tables)
    assert found.shape == (2, 3)
    for at in np.ndindex(2, 3):
        table, n = tables[at], tables[at].sum()

        def corrected(counts: np.ndarray, n: float = n) -> float:
            return entropy(counts.tolist()) + ((counts > 0).sum() - 1) / (2 * n)

        wanted = corrected(table.sum(1)) + corrected(table.sum(0)) - corrected(table.reshape(-1))
        assert found[at] == pytest.approx(max(wanted, 0.0))
    assert mutual_information_of_counts(np.zeros((3, 3))) == 0
    assert entropy_of_counts(np.array([[0, 0], [2, 2], [4, 0]])).tolist() == pytest.approx(
        [0, math.log(2), 0]
    )


def test_chosen_information_is_of_each_pair_of_layers() -> None:
    """Three layers, the first and third alike, the second their product with chance."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 3, (5000,), generator=generator)
    second = (first + torch.randint(0, 2, (5000,), generator=generator)) % 3
    measure = ChosenMutualInformation(3, 4)
    choice = torch.stack((first, second, (first + 1) % 3))
    for part in choice.split([1, 4000, 999], dim=1):
        measure.update(part)
    got = measure.result()
    for i in range(3):
        for j in range(3):
            table = np.zeros((4, 4))
            np.add.at(table, (choice[i].numpy(), choice[j].numpy()), 1)
            assert got[i, j] == pytest.approx(float(mutual_information_of_counts(table)))
    assert measure.n == 5000
    assert got[0, 2] == pytest.approx(math.log(3), abs=0.01)
    assert 0.3 < got[0, 1] < 0.5  # ln 3 - ln 2 = 0.405


def test_tokens_are_digitised_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's bit sets fill the cache and no more; a token at a time would be a hundred times slower."""
    sizes: list[int] = []
    plain = mutual_information.digitise

    def record(probs: np.ndarray, num_bins: int) -> np.ndarray:
        sizes.append(probs.shape[-1])
        return plain(probs, num_bins)

    monkeypatch.setattr(mutual_information, "digitise", record)
    monkeypatch.setattr(mutual_information, "_CHUNK_BYTES", 2 * 5 * 8 * 100)
    probs = np.random.default_rng(0).dirichlet(np.ones(5), (2, 250)).transpose(0, 2, 1)
    mutual_information.digitised_mutual_information(probs)
    assert sizes == [100, 100, 50]


def test_paths_are_merged_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmoe.analysis.paths._BUFFER_TOKENS", 100)
    paths = FrequentPaths(2, 3)
    choice = torch.randint(0, 3, (2, 1000), generator=torch.Generator().manual_seed(0))
    for part in choice.split(30, dim=1):
        paths.update(part)
        assert paths._buffered < 100
    assert sum(count for _, count in paths.top(9)) == paths.n == 1000
    assert (paths.distinct, paths.distinct) == (9, 9)


def test_capacity_factors_of_the_report() -> None:
    assert Load(2, 4, 2, 100).capacity_factors == [1.0, 1.25, 1.5, 2.0]


@pytest.mark.parametrize(("most", "shown"), [(2 * 3 * 36, True), (2 * 3 * 36 - 1, False)])
def test_coactivation_is_left_out_where_it_is_too_large(
    most: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "MAX_COACTIVATION", most)
    batch = random_routing(3, 20, 6, 2)
    measured = RoutingMeasures(Sizes(3, 6, 2, 6), np.full(4, 5))
    measured.update(batch, torch.arange(20) % 4)
    assert (measured.fields(str)["coactivation"] is not None) == shown


def test_explorer_puts_empty_slots_nowhere() -> None:
    """Of each token the experts in use, largest weight first, whatever stands in an empty slot."""
    experts = torch.tensor([[[2, 0, 1], [3, 1, 3], [3, 3, 3]], [[0, 3, 2], [1, 2, 3], [0, 1, 2]]])
    weights = torch.tensor(
        [
            [[0.2, 0.5, 0.3], [9.0, 0.4, 8.0], [1.0, 1.0, 1.0]],
            [[0.4, 7.0, 0.6], [0.5, 0.5, 2.0], [0.1, 0.2, 0.3]],
        ]
    )
    explorer = measures.Explorer(5)
    batch = RoutingBatch(torch.full((2, 3, 3), 1 / 3), experts, weights, 3)
    explorer.update(batch, torch.tensor([7, 8, 9]))
    explorer.update(batch, torch.tensor([4, 5, 6]))
    explorer.update(batch, torch.tensor([1, 1, 1]))
    tokens = explorer.tokens(str, 3)
    assert [token.text for token in tokens] == ["7", "8", "9", "4", "5"]
    assert [token.experts for token in tokens[:3]] == [[[0, 1, 2], [2, 0]], [[1], [1, 2]], [[], [2, 1, 0]]]
    assert tokens[1].weights == [pytest.approx([0.4]), pytest.approx([0.5, 0.5])]
    assert measures.Explorer(0).tokens(str, 3) is None


def test_records_carry_no_gradient() -> None:
    reader = ExpertsReader("mlp", 4, 2)
    logits = torch.randn(5, 4, requires_grad=True)
    weights, experts = logits.softmax(-1).topk(2)
    record = reader.read((logits, weights, experts), (torch.zeros(5, 3), experts, weights), {})
    assert not any(part.requires_grad for part in record[:4])
    assert (record.probs - logits.detach().softmax(-1)).abs().max() < 1e-6
    with pytest.raises(RuntimeError, match="mlp: 2 of the router's results look like logits"):
        reader.read((logits, logits * 2), (torch.zeros(5, 3), experts, weights), {})
    with pytest.raises(RuntimeError, match="mlp: 0 of the router's results look like logits"):
        reader.read((weights, logits.long()), (torch.zeros(5, 3), experts, weights), {})


def test_expert_vectors_of_bfloat16_are_means_in_float32() -> None:
    model = tiny_rmoe().bfloat16()
    for layer in require_layers(model):
        gate_up, down = (getattr(layer.experts, name).float() for name in ("gate_up_proj", "down_proj"))
        parts = [gate_up[:, :16].mean(1), gate_up[:, 16:].mean(1), down.mean(2)]
        wanted = torch.cat([nn.functional.normalize(p, dim=-1) for p in parts], -1)
        found = expert_vectors(layer)
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(("gated", "matrices"), [(True, 3), (False, 2)])
def test_reference_line_has_as_many_matrices_as_the_experts(gated: bool, matrices: int) -> None:
    act = "silu" if gated else "relu"
    model = tiny_rmoe(mlp_gated=gated, hidden_act=act)
    blocks = np.random.default_rng(0).integers(0, 256, (2, 16))
    (found,) = analyze_models([Subject("a", model)], blocks, str, AnalysisOptions(gradient_tokens=0))
    assert found.similarity.random_init == [random_similarity(4, [32] * matrices, 0)] * 3
    assert found.gradient_split is None


def test_paths_of_a_report_are_shares_of_all_tokens() -> None:
    batch = random_routing(2, 40, 3, 1, scale=5.0)
    measured = RoutingMeasures(Sizes(2, 3, 1, 3), np.full(4, 10))
    measured.update(batch, torch.arange(40) % 4)
    paths = measured.fields(str)["paths"]
    counts = Counter(tuple(batch.experts[:, t, 0].tolist()) for t in range(40))
    assert {tuple(path.experts): path.share for path in paths.top} == {p: n / 40 for p, n in counts.items()}
    assert (paths.distinct, paths.n) == (len(counts), 40)
    shares = [path.share for path in paths.top]
    assert shares == sorted(shares, reverse=True)


def test_a_batch_leaves_padding_out() -> None:
    recorder = Recorder(tiny_rmoe("smoe"))
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch = recorder.batch(ids, mask)
    assert batch.num_tokens == 10
    assert torch.equal(batch.experts[:, :4], recorder.batch(ids[:1, :4]).experts)
    assert recorder.batch(ids).num_tokens == 12


def test_empty_slots_have_the_probabilities_of_the_best_null_classes() -> None:
    """Three experts and two null classes; a token with more empty slots than that gets 0 for the rest."""
    probs = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.4], [0.2, 0.2, 0.1, 0.3, 0.2]])
    experts = torch.tensor([[0, 3, 1, 3], [3, 3, 3, 2]])
    batch = RoutingBatch(probs[None], experts[None], torch.zeros(1, 2, 4), 3)
    want = torch.tensor([[[0.3, 0.4, 0.1, 0.1], [0.3, 0.2, 0.0, 0.1]]])
    assert torch.equal(batch.chosen_probs(), want)
    no_null = RoutingBatch(probs[None, :, :3], experts[None], torch.zeros(1, 2, 4), 3)
    assert torch.equal(no_null.chosen_probs(), want.masked_fill(experts == 3, 0.0))


# ---- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3])
def test_gradients_are_the_mean_over_the_batches(batches: int) -> None:
    model = tiny_rmoe("smoe")
    layers = require_layers(model)
    ids = [torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(batches)]
    found = router_gradients(model, layers, find_shared(model, layers), ids)
    for index, layer in enumerate(layers):
        total: Tensor | float = 0.0
        for one in ids:
            logits = model(one).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), one[:, 1:].reshape(-1))
            total = total + torch.autograd.grad(loss, layer.gate.scorer.linear.weight)[0]
        assert found.language_model[0][index] == pytest.approx(float((total / batches).norm()), rel=1e-4)
    assert found.tokens == 18 * batches
    assert (found.language_model_cut, found.recurrent, found.shared) == (None, None, None)


def test_only_the_routers_parameters_are_differentiated() -> None:
    """For the length of the measurement; afterwards each is as trainable as it was."""
    model = tiny_rmoe("smoe")
    frozen = model.lm_head.weight.requires_grad_(False)
    routers = [layer.gate.scorer.linear.weight for layer in require_layers(model)]
    before = [p.requires_grad for p in model.parameters()]
    with _only_trainable(model, routers):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 3
        assert all(a is b for a, b in zip(trained, routers, strict=True))
    assert [p.requires_grad for p in model.parameters()] == before
    assert not frozen.requires_grad


def test_a_balance_loss_without_a_gradient_is_none() -> None:
    model = tiny_rmoe("smoe")
    for loss in (None, 0.5, torch.tensor(0.5)):
        assert balance_loss(model, SimpleNamespace(aux_loss=loss, balance_loss=loss)) is None
    loss, weighted = torch.tensor(0.5, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    assert balance_loss(model, SimpleNamespace(aux_loss=loss, balance_loss=weighted)) is weighted
    other = nn.Linear(1, 1)
    other.config = SimpleNamespace(router_aux_loss_coef=0.25)
    assert float(balance_loss(other, SimpleNamespace(aux_loss=loss)).detach()) == 0.125


def test_the_cut_takes_the_state_and_nothing_else() -> None:
    """State comes as the second argument or by name; what stands beside it keeps its gradient, and its place."""

    class Router(nn.Module):
        def forward(self, hidden: Tensor, state: tuple, third: Tensor, other: Tensor) -> list[bool]:
            return [
                hidden.requires_grad,
                *(s.requires_grad for s in state),
                third.requires_grad,
                other.requires_grad,
            ]

    router = Router()
    layer = RoutedLayer("mlp", "", 0, router, "mlp.gate", nn.Identity(), 4, 2, ExpertsReader("mlp", 4, 2))
    x = torch.ones(2, requires_grad=True)
    with recurrence_cut([layer]) as found:
        assert router(x, (x, x), x, other=x) == [True, False, False, True, True]
        assert len(found) == 2
        assert router(x, state=(x,), third=x, other=x) == [True, False, True, True]
        assert router(x, (), x, x) == [True, True, True]
        assert len(found) == 3
        assert router(x.detach(), (x.detach(),), x, x) == [False, False, True, True]
        assert len(found) == 3
    assert router(x, (x,), x, x) == [True, True, True, True]


# ---- sequence length ----------------------------------------------------------------------------------------


def models(*longest: int | None) -> list[SimpleNamespace]:
    configs = [SimpleNamespace(max_position_embeddings=n) for n in longest]
    return [SimpleNamespace(config=SimpleNamespace(get_text_config=lambda c=c: c)) for c in configs]


def test_sequence_length_is_at_most_the_shortest_models() -> None:
    assert _sequence_length(None, models(4096)) == 512
    assert _sequence_length(None, models(4096, 100)) == 100
    assert _sequence_length(None, models(None)) == 512
    assert _sequence_length(2, models(100)) == 2
    assert _sequence_length(100, models(300, 100)) == 100
    for asked in (1, 0, 101):
        with pytest.raises(RequestError, match=r"--sequence-length is .*; allowed: 2 to 100"):
            _sequence_length(asked, models(300, 100))
