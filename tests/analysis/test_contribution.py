"""What each source adds to a route: known answers, one source written out by hand, and sums that must be exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rmoe.analysis.contribution import RouteContributions
from rmoe.analysis.gradients import find_shared
from rmoe.graft import graft
from rmoe.moe import Recorder, RoutingRecord
from tests.analysis.tiny_rmoe import tiny_rmoe
from tests.graft.conftest import SPEC, at_work
from tests.graft.tiny_families import tiny_model

IDS = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))


def measured(model: nn.Module) -> tuple[RouteContributions, list[RoutingRecord]]:
    recorder = Recorder(model)
    measure = RouteContributions(model, recorder.layers, find_shared(model, recorder.layers))
    for row in IDS:  # figures are means over batches
        with measure.listening():
            recorder(row[None])
        measure.update()
    assert measure.n == IDS.numel()
    return measure, recorder(IDS)


def advantage(record: RoutingRecord) -> float:
    """Token by token: mean logit of the chosen experts less the mean of all."""
    values = [
        float(logits[chosen[chosen < record.num_experts]].mean() - logits[: record.num_experts].mean())
        for logits, chosen in zip(record.logits.double(), record.experts, strict=True)
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "mixtral", "granitemoe"])
def test_contributions_sum_to_the_advantage(family: str) -> None:
    measure, records = measured(tiny_model(family))
    found = measure.result()
    values, state, total = found.values, found.state, found.advantage
    indices = [layer.index for layer in measure.layers]
    assert state == [None] * len(records)
    for record, row, index, whole in zip(records, values, indices, total, strict=True):
        assert whole == pytest.approx(advantage(record), rel=1e-4)
        assert [value is None for value in row] == [place > index + 1 for place in range(len(row))]
        assert sum(value for value in row if value is not None) == pytest.approx(whole, rel=1e-3)


def test_a_layer_that_adds_nothing_contributes_nothing() -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        for at in (0, 2):
            model.model.layers[at].mlp.experts.down_proj.zero_()
    found = measured(model)[0].result()
    values, total = found.values, found.advantage
    for at, row in enumerate(values):
        assert row[1 + at] == 0  # its own attention
        assert all(row[1 + below] == 0 for below in (0, 2) if below < at)
    assert values[0][0] == pytest.approx(total[0], rel=1e-4)  # all is the embedding's
    assert values[2][2] != 0  # but layer 1 speaks


def test_one_source_against_the_logits_of_it_alone() -> None:
    """Layer 1's part in layer 3's route, from `G diag(w / rms) part` written out."""
    model = tiny_model("olmoe")
    measure, records = measured(model)
    layers: Any = model.model.layers
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layers[1].register_forward_pre_hook(lambda m, args: seen.update(before=args[0])),
        layers[2].register_forward_pre_hook(lambda m, args: seen.update(after=args[0])),
        layers[3].post_attention_layernorm.register_forward_pre_hook(
            lambda m, args: seen.update(stream=args[0])
        ),
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        for handle in handles:
            handle.remove()
        norm = layers[3].post_attention_layernorm
        rms = (seen["stream"].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        part = norm.weight * (seen["after"] - seen["before"]) / rms
        logits = (part @ layers[3].mlp.gate.weight.T).flatten(0, 1)
    expected = advantage(records[3]._replace(logits=logits))
    assert measure.result().values[3][2] == pytest.approx(expected, rel=1e-4)


def test_the_state_of_a_graft_is_exact() -> None:
    model = at_work(graft(tiny_model("olmoe"), SPEC)).eval()
    measure, records = measured(model)
    found = measure.result()
    values, state, total = found.values, found.state, found.advantage
    for record, row, part, whole in zip(records, values, state, total, strict=True):
        assert part is not None
        assert part != 0
        assert whole == pytest.approx(advantage(record), rel=1e-4)
        assert sum(value for value in row if value is not None) + part == pytest.approx(whole, rel=1e-3)


def test_the_state_of_rmoe_is_what_is_lost_without_it() -> None:
    model = tiny_rmoe("rmoe")
    measure, records = measured(model)
    found = measure.result()
    values, state, total = found.values, found.state, found.advantage
    assert all(value is None for row in values for value in row)  # its router is not linear
    assert state[0] is None  # no layer below
    lost: list[torch.Tensor] = []
    router = model.routers[2]
    handle = router.register_forward_hook(
        lambda m, args, kwargs, output: lost.append(m.forward(args[0], (), **kwargs)[0].logits),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    without = advantage(records[2]._replace(logits=lost[0].detach()))
    assert state[2] == pytest.approx(total[2] - without, rel=1e-3)
    assert state[2] != 0


def test_where_it_is_not_exact_there_is_no_row() -> None:
    """Post-norm: the stream is not a sum. RMoE's linear router in a pre-norm model is."""
    for position, known in (("pre", True), ("post", False)):
        values = measured(tiny_rmoe("smoe", norm_position=position))[0].result().values
        assert all((row[0] is not None) == known for row in values)
    measure, _ = measured(tiny_model("zaya"))  # reads the layer below and has an MLP
    assert not measure.known
