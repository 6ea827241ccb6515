"""Every path through the model computes the same: attention, experts, checkpointing, compilation."""

from __future__ import annotations

import pytest
import torch

from rmoe.model.norm import RMSNorm
from tests.model.small import POST, PRE, assert_same, loss_and_gradients, model, tokens
from tests.versions import since

ARCHITECTURES = [PRE, POST]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["pre", "post"])
@pytest.mark.parametrize(
    ("attention", "experts"), [("eager", "eager"), ("sdpa", "grouped_mm"), ("sdpa", "batched_mm")]
)
def test_implementations_agree(architecture: dict, attention: str, experts: str) -> None:
    want = loss_and_gradients(model(**architecture), tokens())
    assert_same(
        loss_and_gradients(model(attention=attention, experts=experts, **architecture), tokens()), want
    )


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("router", ["eda", "remoe", "smoe-capacity", "smoe-dropout", "expert-choice"])
def test_empty_slots_agree(router: str, experts: str) -> None:
    want = loss_and_gradients(model(router=router), tokens())
    assert_same(loss_and_gradients(model(router=router, experts=experts), tokens()), want)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["pre", "post"])
@pytest.mark.parametrize("router", ["rmoe", "rmoe-lstm", "gshard", "noisy-topk", "smoe-global"])
def test_checkpointing_changes_nothing(architecture: dict, router: str) -> None:
    """Dropout and routing noise are on: recomputation must see the same of both."""
    plain = model(router=router, hidden_dropout=0.2, **architecture).train()
    torch.manual_seed(0)
    want = loss_and_gradients(plain, tokens())
    checkpointed = model(router=router, hidden_dropout=0.2, **architecture).train()
    checkpointed.gradient_checkpointing_enable()
    torch.manual_seed(0)
    assert_same(loss_and_gradients(checkpointed, tokens()), want)


def test_checkpointing_counts_each_token_once() -> None:
    net = model().train()
    net.gradient_checkpointing_enable()
    out = net(tokens(), labels=tokens())
    out.loss.backward()
    assert out.router_stats.tokens == 39
    assert out.router_stats.counts.sum(-1).tolist() == [78, 78]


def test_reentrant_checkpointing_is_not_heeded() -> None:
    """It warns, and the gradients are those of the other form: the balance loss's too."""
    want = loss_and_gradients(model().train(), tokens())
    net = model().train()
    with pytest.warns(UserWarning, match="non-reentrantly"):
        net.gradient_checkpointing_enable({"use_reentrant": True})
    assert all(layer.gradient_checkpointing for layer in net.model.layers)
    assert_same(loss_and_gradients(net, tokens()), want)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["pre", "post"])
def test_compiled_agrees(architecture: dict, experts: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    want = loss_and_gradients(model(**architecture), tokens())
    net = model(experts=experts, **architecture).train()
    if checkpointing:
        net.gradient_checkpointing_enable()
    compiled = torch.compile(net, fullgraph=True)
    assert_same(loss_and_gradients(compiled, tokens()), want)


@since("transformers", "5.23", "its grouped product in Python cannot be traced")
@pytest.mark.parametrize("router", ["rmoe", "smoe", "eda", "hash", "noisy-topk", "smoe-capacity"])
def test_one_graph(router: str) -> None:
    """`fullgraph=True` traces without a break; the aot backend checks it without inductor's minute of compiling."""
    torch._dynamo.reset()
    ids = tokens(vocab=67)
    net = model(router=router, experts="grouped_mm", num_hidden_layers=2).train()
    want = loss_and_gradients(net, ids)
    net.set_routing_noise(0, 0)
    assert_same(loss_and_gradients(torch.compile(net, fullgraph=True, backend="aot_eager"), ids), want)


def test_tied_embeddings() -> None:
    net = model(tie_word_embeddings=True)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    loss, gradients = loss_and_gradients(net, tokens())
    assert "lm_head.weight" not in gradients
    assert loss > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_one_row_without_gradients(dtype: torch.dtype) -> None:
    norm = RMSNorm(37, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 1, 37, dtype=dtype)
    with torch.no_grad():
        got = norm(x)
    row = x.double()
    want = row / (row.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert got.dtype == dtype
    assert (got - want).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
