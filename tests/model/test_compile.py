"""A compiled step is compiled once: how many tokens an expert gets is data, not a shape."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from tests.model.small import model, tokens
from tests.versions import since


@pytest.mark.parametrize(
    "experts",
    [
        "auto",
        pytest.param(
            "grouped_mm",
            marks=since("transformers", "5.23", "its grouped product in Python cannot be traced"),
        ),
    ],
)
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


@pytest.mark.parametrize("router", ["rmoe", "smoe"])
def test_compiled_decoding_with_a_static_cache(router: str) -> None:
    torch._dynamo.reset()
    counters["stats"].clear()
    net = model(router=router, experts="auto", num_hidden_layers=2).eval()
    ids = tokens()
    cache = StaticCache(config=net.config, max_cache_len=ids.shape[1])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        whole = net(ids, use_cache=False).logits
        prompt = net(ids[:1, :4], past_key_values=cache, use_cache=True).logits
        assert torch.allclose(prompt, whole[:1, :4], atol=1e-5)
        for position in range(4, ids.shape[1]):
            step = {"input_ids": ids[:1, position, None], "position_ids": torch.tensor([[position]])}
            logits = compiled(**step, past_key_values=cache, use_cache=True).logits
            assert torch.allclose(logits[:, 0], whole[:1, position], atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
