"""Padding stays out of everything, and generation does not depend on how it is done."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, StaticCache

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM
from tests.model.small import POST, PRE, model, tokens


@pytest.mark.parametrize(
    "router", ["rmoe", "smoe", "eda-linear", "deepseek-v3", "smoe-capacity", "expert-choice"]
)
def test_padding_stays_out(router: str) -> None:
    """The same sequences, padded, give the same losses and counts."""
    net = model(router=router).train()
    ids = tokens(2, 9)
    want = net(ids, labels=ids)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    got = net(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    # The first real token is predicted by a pad in the padded batch; leave it out of the labels of both.
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 4] = -100
    got = net(padded, attention_mask=mask, labels=labels)
    assert torch.equal(got.router_stats.counts, want.router_stats.counts)
    assert got.router_stats.tokens == want.router_stats.tokens == 18
    assert (got.router_stats.entropy - want.router_stats.entropy).abs().max() < 1e-4
    assert abs(float(got.balance_loss - want.balance_loss)) < 1e-7
    assert abs(float(got.lm_loss - want.lm_loss)) < 1e-5


def test_a_mask_of_ones_is_no_mask() -> None:
    net, ids = model(), tokens()
    assert torch.equal(net(ids).logits, net(ids, attention_mask=torch.ones_like(ids)).logits)


def greedy(
    net: torch.nn.Module, ids: torch.Tensor, steps: int, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    out = net.generate(
        ids, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        **options,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def assert_same_choice(got: torch.Tensor, want: torch.Tensor, logits: torch.Tensor) -> None:
    """Equal up to the first place where the two best logits are within 1e-4, row by row."""
    best = logits.topk(2, -1).values
    clear = (best[..., 0] - best[..., 1]) > 1e-4
    for row in range(got.shape[0]):
        for step in range(got.shape[1]):
            if not clear[row, step]:
                break
            assert got[row, step] == want[row, step], (row, step)


@pytest.mark.parametrize("architecture", [PRE, POST], ids=["pre", "post"])
@pytest.mark.parametrize("router", ["rmoe", "smoe", "rmoe-lstm", "hash"])
def test_caches_agree(architecture: dict, router: str) -> None:
    net = model(router=router, **architecture).eval()
    ids = tokens(2, 7)
    want, logits = greedy(net, ids, 12, use_cache=False)
    dynamic, _ = greedy(net, ids, 12, use_cache=True)
    assert_same_choice(dynamic, want, logits)
    static, _ = greedy(net, ids, 12, cache_implementation="static", disable_compile=True)
    assert_same_choice(static, want, logits)


def test_static_cache_in_forward() -> None:
    net = model().eval()
    ids = tokens(2, 10)
    want = net(ids).logits
    cache = StaticCache(config=net.config, max_cache_len=16)
    first = net(ids[:, :6], past_key_values=cache, use_cache=True).logits
    rest = [net(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(6, 10)]
    assert (torch.cat((first, *rest), 1) - want).abs().max() < 1e-5


def test_a_mask_as_long_as_a_static_cache() -> None:
    """Padding on the left; columns behind this call's tokens are of tokens to come."""
    net, ids = model(router="smoe-capacity").eval(), tokens(2, 10)
    real = torch.ones(2, 16, dtype=torch.long)
    real[0, :3] = 0
    for first in (10, 6):
        cache = StaticCache(config=net.config, max_cache_len=16)
        for start, stop in ((0, first), (first, 10)) if first < 10 else ((0, 10),):
            long, short = real.clone(), real[:, :stop]
            long[:, stop:] = 0
            got = net(ids[:, start:stop], attention_mask=long, past_key_values=cache, use_cache=True)
            assert int(got.router_stats.tokens) == int(short[:, start:].sum())
        if first == 10:
            want = net(ids, attention_mask=short, use_cache=False).logits
            torch.testing.assert_close(got.logits[short.bool()], want[short.bool()], atol=1e-5, rtol=1e-4)


def test_left_padding_generates_what_single_prompts_do() -> None:
    net = model(router="rmoe").eval()
    prompts = [tokens(1, n, seed=n) for n in (3, 8, 5)]
    width = max(p.shape[1] for p in prompts)
    batch = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    together, _ = greedy(net, batch, 10, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        alone, logits = greedy(net, prompt, 10)
        assert_same_choice(together[row : row + 1], alone, logits)


def test_expert_choice_does_not_generate() -> None:
    with pytest.raises(RequestError, match=r"gate\.kind is 'expert_choice'"):
        model(router="expert-choice").generate(tokens(1, 4), max_new_tokens=2)


def test_hash_needs_token_ids() -> None:
    net = model(router="hash")
    with pytest.raises(ValueError, match="reads token ids"):
        net(inputs_embeds=net.model.embed_tokens(tokens()))


@pytest.mark.parametrize("router", ["expert-choice", "acmoe"])
def test_what_cannot_generate_cannot_in_batches_either(router):
    config = RMoEConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts=4, router=router)
    small = RMoEForCausalLM(config).eval()
    with pytest.raises(RequestError, match=r"(gate|router)\.kind is .*, to generate text"):
        small.generate_batch(inputs=[[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=2))


def test_a_draft_of_layers_that_do_not_route():
    config = RMoEConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_experts=4, router="smoe", first_k_dense_replace=1,
        output_router_logits=True,
    )  # fmt: skip
    small = RMoEForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    plain = small.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(small.generate(ids, max_new_tokens=3, do_sample=False, assistant_early_exit=1), plain)
