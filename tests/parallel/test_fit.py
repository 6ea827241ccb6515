"""What a layout cannot carry is one line, and no plan offers it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM
from rmoe.parallel import ParallelConfig, PipelinePart, distribute
from rmoe.parallel.fit import misfit
from rmoe.planning.hardware import ACCELERATORS, Cluster
from rmoe.planning.layouts import layouts_for

TIED = {"tie_word_embeddings": True}
DEFAULT = {"router": "smoe", "dense_gradients": "default"}
REFUSED: list[tuple[dict[str, Any], dict[str, int], str]] = [
    (TIED, {"tensor": 2}, "tie_word_embeddings is True; allowed: False with parallel.tensor"),
    (TIED, {"pipeline": 2}, "tie_word_embeddings is True"),
    ({"num_attention_heads": 3, "head_dim": 8}, {"tensor": 2}, "parallel.tensor is 2; allowed: a divisor of num_at"),
    ({"num_key_value_heads": 1}, {"tensor": 2}, "and num_key_value_heads (1)"),
    ({"router": "dense"}, {"fsdp": 4, "expert": 4}, "a divisor of a layer's experts (2)"),
    (DEFAULT, {"fsdp": 2, "expert": 2}, "dense_gradients is 'default'"),
    (DEFAULT, {"tensor": 2}, "dense_gradients is 'default'"),
    (DEFAULT, {"pipeline": 2}, "dense_gradients is 'default'"),
    ({"router": "hash"}, {"pipeline": 2}, "router.kind is"),
    ({"router": "smoe-global"}, {"pipeline": 2}, "balance.scope is 'global_batch'"),
    ({"num_hidden_layers": 3}, {"pipeline": 4}, "parallel.pipeline is 4; allowed: 1 to num_hidden_layers (3)"),
]  # fmt: skip


def config(**changes: Any) -> RMoEConfig:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    return RMoEConfig(**{**sizes, "moe_intermediate_size": 15, "num_hidden_layers": 4, **changes})


def spread(model: RMoEForCausalLM, parallel: ParallelConfig) -> object:
    if parallel.pipeline > 1:
        return PipelinePart(model, 0, parallel.pipeline)
    return distribute(model, parallel, parallel.processes)


@pytest.mark.parametrize(("changes", "sizes", "said"), REFUSED)
def test_refused_in_one_line(changes, sizes, said):
    parallel, model = ParallelConfig(**sizes), RMoEForCausalLM(config(**changes))
    with pytest.raises(RequestError) as error:
        spread(model, parallel)
    assert said in str(error.value)
    assert str(misfit(config(**changes), parallel)) == str(error.value)


@pytest.mark.parametrize(("changes", "sizes", "said"), REFUSED)
def test_not_in_a_plan(changes, sizes, said):
    devices = math.prod(size for kind, size in sizes.items() if kind != "expert")
    offered = layouts_for(config(**changes), Cluster(devices, devices, ACCELERATORS["h100"]))
    assert ParallelConfig(**sizes) not in offered
    assert ParallelConfig(replicate=devices) in offered


def test_a_plan_offers_what_runs():
    sharded = {ParallelConfig(fsdp=2), ParallelConfig(fsdp=2, expert=2)}
    cluster = Cluster(2, 2, ACCELERATORS["h100"])
    assert sharded | {ParallelConfig(tensor=2), ParallelConfig(pipeline=2)} <= set(
        layouts_for(config(), cluster)
    )
    assert sharded <= set(layouts_for(config(**TIED), cluster))


@pytest.mark.parametrize("bf16", [True, False])
def test_a_pipeline_computes_in_the_precision_it_is_given(bf16: bool) -> None:
    """In training and in evaluation; the loss is taken of the logits that autocast gives."""
    model = RMoEForCausalLM(config(router="rmoe"))
    ids = torch.arange(24).reshape(2, 12)
    part = PipelinePart(model, 0, 1, bf16)
    for training in (True, False):
        part.train(training), model.train(training)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            want = model(ids, use_cache=False).logits
        assert torch.equal(part(ids)[0], want)
        assert want.dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"tensor": 4, "expert": 2},
            r"1, or a multiple of parallel.tensor \(4\) that divides fsdp x tensor \(4\)",
        ),
        ({"fsdp": 2, "tensor": 3, "expert": 2}, r"a multiple of parallel.tensor \(3\)"),
        ({"fsdp": 3, "expert": 2}, r"1, or a divisor of parallel.fsdp \(3\)"),
    ],
)
def test_experts_over_devices_that_share_them(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ParallelConfig(**sizes)
    assert ParallelConfig(fsdp=2, tensor=2, expert=4).expert == 4
