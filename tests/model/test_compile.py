"""A compiled step is compiled once: how many tokens an expert gets is data, not a shape."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.model.small import model, tokens


@pytest.mark.parametrize("experts", ["auto", "grouped_mm"])
@pytest.mark.parametrize("router", ["rmoe", "smoe-capacity"])
def test_no_recompilation_when_loads_change(router: str, experts: str) -> None:
    torch._dynamo.reset()
    counters["stats"].clear()
    net = model(router=router, experts=experts, num_hidden_layers=2).train()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    loads = []
    for seed in range(3):
        ids = (
            tokens(seed=seed) if seed < 2 else torch.zeros(3, 13, dtype=torch.int64)
        )  # all alike: idle experts
        out = compiled(ids, labels=ids, output_logits=False, use_cache=False)
        out.loss.backward()
        loads.append(out.router_stats.counts[0].tolist())
    assert counters["stats"]["unique_graphs"] == 1
    assert loads[0] != loads[1]
    assert 0 in loads[2]
