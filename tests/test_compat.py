"""The names of other packages that `rmoe.compat` vouches for are there, and mean what it says."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache, OlmoeForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils import TransformersKwargs

from rmoe.compat import ATTENTION_KEYWORDS, CACHE, CACHE_NAMES, enable_checkpointing
from rmoe.errors import RequestError
from rmoe.model import RMoEForSequenceClassification
from tests.model.small import config, model, tokens


def test_the_cache_has_one_of_two_names() -> None:
    named = set(CACHE_NAMES) & set(inspect.signature(LlamaAttention.forward).parameters)
    assert named == {CACHE}
    assert CACHE in inspect.signature(OlmoeForCausalLM.forward).parameters


def test_every_attention_keyword_of_transformers_is_known() -> None:
    own = {
        "num_items_in_batch",
        "position_ids",
        "output_hidden_states",
        "output_router_logits",
    }  # ours by name
    assert set(TransformersKwargs.__annotations__) - own <= ATTENTION_KEYWORDS


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_both_names_of_the_cache_work(name: str) -> None:
    net, ids = model().eval(), tokens(2, 9)
    want = net(ids).logits
    cache = DynamicCache(config=net.config)
    first = net(ids[:, :5], **{name: cache}).logits
    rest = net(ids[:, 5:], **{name: cache})
    assert (torch.cat((first, rest.logits), 1) - want).abs().max() < 1e-5
    assert rest[CACHE] is cache
    with pytest.raises(TypeError, match="not both"):
        net(ids, cache=cache, past_key_values=DynamicCache(config=net.config))


@pytest.mark.parametrize("of", ["trunk", "causal", "classifier"])
def test_an_unknown_keyword_is_an_error_that_names_it(of: str) -> None:
    net = RMoEForSequenceClassification(config(num_labels=2)) if of == "classifier" else model()
    called = net.model if of == "trunk" else net
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_keys'"):
        called(tokens(), past_keys=None)


def test_attention_gets_its_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    forward = LlamaAttention.forward

    def spy(self: LlamaAttention, *args: object, **kwargs: object) -> object:
        seen.append(set(kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", spy)
    net = model()
    net(tokens(), attention_instances={0: None})
    assert len(seen) == net.config.num_hidden_layers
    assert all("attention_instances" in names for names in seen)


def test_checkpointing_has_one_of_two_names() -> None:
    net = model().train()
    enable_checkpointing(net)
    assert all(layer.gradient_checkpointing for layer in net.model.layers)
    assert any(
        hasattr(PreTrainedModel, f"{kind}_checkpointing_enable") for kind in ("activation", "gradient")
    )
    with pytest.raises(RequestError, match="use_reentrant is True"):
        net.gradient_checkpointing_enable({"use_reentrant": True})


def test_flags_are_heeded_from_the_configuration_and_the_call() -> None:
    net, ids = model(attention="eager").eval(), tokens(2, 7)
    layers = net.config.num_hidden_layers
    plain = net(ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is plain.aux_loss is None
    assert plain[CACHE].get_seq_length() == 7
    assert CACHE not in net(ids, use_cache=False)
    flags = ("output_hidden_states", "output_attentions", "output_router_logits")
    asked = net(ids, **dict.fromkeys(flags, True))
    for flag in flags:
        setattr(net.config, flag, True)
    configured = net(ids)
    for out in (asked, configured):
        assert len(out.hidden_states) == layers + 1
        assert [tuple(a.shape) for a in out.attentions] == [
            (2, net.config.num_attention_heads, 7, 7)
        ] * layers
        assert [tuple(r.shape) for r in out.router_logits] == [
            (14, net.config.num_experts)
        ] * net.config.num_moe_layers
        assert torch.equal(out.hidden_states[-1], net.trunk(ids).last_hidden_state)
        assert torch.equal(out.balance_loss, net.balance_loss(net.trunk(ids)))
    assert net(ids, output_attentions=False).attentions is None
    # As tuples, the balance loss comes before the logits.
    assert torch.equal(net(ids, return_dict=False)[1], plain.logits)
    net.config.return_dict = False
    assert torch.equal(net(ids)[1], plain.logits)
