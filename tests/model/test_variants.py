"""Every path through the model computes the same: attention, experts, checkpointing, compilation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from rmoe.compat import FakeTensorMode
from rmoe.model import RMoEForSequenceClassification
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
    # As trainers call it. Where checkpointing turns a cache off, transformers 5.24 says so, which breaks the graph of
    # its own models too.
    assert_same(loss_and_gradients(compiled, tokens(), use_cache=False), want)


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


def test_one_row_without_its_numbers() -> None:
    """A trace follows the next row, and a tensor without numbers has a shape: neither may read one."""
    small = model(router="smoe", experts="sorted_mm").eval()
    norm = small.model.norm
    # Seeded: the row's own path rounds otherwise than the traced one for about half of all rows.
    x, y = torch.randn(2, 1, 1, small.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(norm, x)(y), norm(y))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert small(torch.zeros(1, 1, dtype=torch.long)).logits.shape == (1, 1, small.config.vocab_size)


def test_layers_on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `device_map="auto"` puts them: the meta device stands for a second GPU, accelerate moves a layer's inputs."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # the meta device has none
    small = model(router="smoe", experts="batched_mm", first_k_dense_replace=0).eval()
    second = torch.device("meta")
    for module in (*small.model.layers[1:], small.model.norm, small.lm_head):
        module.to(second)
        add_hook_to_module(
            module, AlignDevicesHook(second, skip_keys=list(small._skip_keys_device_placement))
        )
    ids = tokens()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = small(ids, labels=ids, attention_mask=mask, use_cache=False)
    assert {out.logits.device, out.router_stats.counts.device, out.loss.device} == {second}


def test_a_classifiers_last_tokens_where_its_last_layers_are() -> None:
    """Mask and ids are on the first GPU, hidden states on the second, as which the meta device stands."""
    hidden, mask = torch.ones(2, 5, 4, device="meta"), torch.ones(2, 5)
    head: Any = SimpleNamespace(config=SimpleNamespace(pad_token_id=0))
    for given in ((None, mask), (mask.long(), None)):
        assert RMoEForSequenceClassification._ends(head, hidden, *given).device == hidden.device


def test_what_all_layers_share_stays_where_it_is() -> None:
    """accelerate moves the modules among a layer's arguments in place, under their own hooks."""
    assert "shared" in model()._skip_keys_device_placement


def test_early_exit_below_the_first_routing_layer() -> None:
    small = model(first_k_dense_replace=1, pad_token_id=0, eos_token_id=None).eval()
    ids = torch.tensor([[1, 2, 3]])
    drafted = small.generate(ids, max_new_tokens=5, do_sample=False, assistant_early_exit=1)
    assert torch.equal(drafted, small.generate(ids, max_new_tokens=5, do_sample=False))
