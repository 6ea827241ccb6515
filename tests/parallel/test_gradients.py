"""Two processes, every layout: the loss and each gradient are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rmoe.model import RMoEConfig, RMoEForCausalLM
from rmoe.parallel.sharding import whole
from rmoe.routing.zoo import ZOO
from tests.torchrun import report_of
from tests.versions import since


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report_of("tests.parallel.worker", tmp_path_factory.mktemp("layouts") / "report.json")


HAS_EP = since("transformers", "5.23", "it has no `ep_size`")
EMPTY_SLOTS = ["top-p", "moepp", "remoe", "smoe-capacity"]
# Sums that nearly cancel: the gradients of constant experts (DDP, which moves no token, is off by as much) and of a
# temperature.
BOUND = {"fsdp2+ep moepp": 1e-4, "fsdp2 xmoe": 1e-5}


@pytest.mark.parametrize(
    "case",
    [
        "ddp rmoe",
        "fsdp2 rmoe",
        "fsdp2 smoe tied",
        "fsdp2 smoe erc",
        "fsdp2 smoe competition",
        "fsdp2 xmoe",
        "fsdp2 hyper-moe",
        "fsdp2 smoe-similarity",
        "fsdp2 dynmoe",
        pytest.param("fsdp2+ep rmoe", marks=HAS_EP),
        pytest.param("fsdp2+ep smoe tied", marks=HAS_EP),
        *(pytest.param(f"fsdp2+ep {router}", marks=HAS_EP) for router in EMPTY_SLOTS),
        pytest.param("tp rmoe", marks=since("torch", "2.13", "its DTensor cannot gather packed experts")),
        "pp rmoe",
        "pp rmoe-lstm",
    ],
)
def test_equal_to_one_process(report, case, note):
    found = report[case]
    note(kind=f"layout: {case}", gradient=max(found["gradients"].values()), loss=found["loss"])
    assert found["loss"] <= 1e-6
    assert found["missing"] == []
    assert sorted(found["gradients"]) == found["expected"]
    assert max(found["gradients"].values()) <= BOUND.get(case, 1e-6)
    if "rmoe" in case.split()[1].split("-"):
        assert any("router_shared" in name for name in found["gradients"])


@pytest.mark.slow
def test_fsdp_takes_every_row(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, row in ZOO.items():
            config = RMoEConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_experts=8,
                num_experts_per_tok=row.top_k or 2, moe_intermediate_size=16, initializer_range=0.05, router=name,
            )  # fmt: skip
            model = RMoEForCausalLM(config).train()
            ids = torch.randint(0, 64, (2, 7))
            model.set_routing_noise(0, 0)
            alone = model(ids, labels=ids, use_cache=False).loss
            alone.backward()
            wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.set_routing_noise(0, 0)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            torch.testing.assert_close(
                (loss, found), (alone, wanted), msg=lambda said, row=name: f"{row}: {said}"
            )
    finally:
        dist.destroy_process_group()


def test_batches_that_a_pipeline_cannot_cut_are_refused(report):
    assert report["refused"] == [
        "micro_batches is 1; allowed: 2 or more, one for each stage",
        "input_ids is 8; allowed: a multiple of micro_batches (3), in sequences",
    ]
