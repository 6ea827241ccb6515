"""`generate`: every way of decoding and every cache gives the tokens that decoding without a cache gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    TextStreamer,
)

from rmoe.data.encode import byte_tokenizer
from tests.seams.families import CACHE, PAD, VOCAB, Family, close, ids
from tests.seams.job import job

GROUP = "Generation"
NEW = 8


def generate(model: Any, prompt: Tensor | None = None, seed: int | None = None, **options: Any) -> Tensor:
    """`NEW` more tokens, greedy unless changed, all-ones mask unless given."""
    prompt = ids() if prompt is None else prompt
    defaults = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
        "pad_token_id": PAD, "eos_token_id": None,
    }  # fmt: skip
    if seed is not None:
        torch.manual_seed(seed)
    return model.generate(input_ids=prompt, **{**defaults, **options})


def uncached(model: Any, prompt: Tensor | None = None, **options: Any) -> Tensor:
    return generate(model, prompt, use_cache=False, **options)


def same(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got, want), f"{got.tolist()} instead of {want.tolist()}"


def _both(family: Family, **options: Any) -> None:
    """With and without a cache: the same."""
    model = family.causal()
    got, want = generate(model, **options), uncached(model, **options)
    same(got, want)
    assert len(set(want[:, -NEW:].flatten().tolist())) > 2, "a text that would show nothing"


@job(GROUP, "greedy")
def greedy(family: Family, tmp: Path) -> None:
    _both(family)


@job(GROUP, "greedy, against a loop of one's own over whole prefixes")
def greedy_by_hand(family: Family, tmp: Path) -> None:
    model = family.causal()
    text = ids()
    with torch.no_grad():
        for _ in range(NEW):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    same(generate(model), text)


@job(GROUP, "sampling, with temperature, top-k, top-p, min-p and penalties")
def sampling(family: Family, tmp: Path) -> None:
    _both(family, do_sample=True, seed=3)
    _both(
        family, do_sample=True, seed=3, temperature=1.3, top_k=50, top_p=0.9, min_p=0.001, repetition_penalty=1.2,
        no_repeat_ngram_size=2,
    )  # fmt: skip


@job(GROUP, "beams")
def beams(family: Family, tmp: Path) -> None:
    _both(family, num_beams=3)


@job(GROUP, "beams, sampled, several sequences returned")
def sampled_beams(family: Family, tmp: Path) -> None:
    _both(family, num_beams=4, do_sample=True, num_return_sequences=2, seed=5)


@job(GROUP, "several sequences per prompt")
def several_sequences(family: Family, tmp: Path) -> None:
    _both(family, do_sample=True, num_return_sequences=3, seed=5)


@job(GROUP, "scores, logits, hidden states and attentions returned")
def returned_dict(family: Family, tmp: Path) -> None:
    model = family.causal(attn_implementation="eager")
    options = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True,
        "output_attentions": True,
    }  # fmt: skip
    got, want = generate(model, **options), uncached(model, **options)
    same(got.sequences, want.sequences)
    close(torch.stack(got.logits), torch.stack(want.logits), 1e-4)
    close(torch.stack(got.scores), torch.stack(want.scores), 1e-4)
    for mine, whole in zip(got.hidden_states, want.hidden_states, strict=True):
        for cached_layer, layer in zip(mine, whole, strict=True):
            close(cached_layer[:, -1], layer[:, -1], 1e-4)
    assert len(got.attentions) == NEW
    close(model.compute_transition_scores(got.sequences, got.scores), torch.zeros(2, NEW) + _picked(got))


def _picked(out: Any) -> Tensor:
    """The score of each token chosen, `[B, NEW]`."""
    scores = torch.stack(out.scores, 1)
    return scores.gather(-1, out.sequences[:, -NEW:, None])[..., 0]


@job(GROUP, "assisted, as the model that decides")
def assisted(family: Family, tmp: Path) -> None:
    from tests.seams.families import CONTROL, FAMILIES

    model = family.causal()
    same(generate(model, ids(1), assistant_model=FAMILIES[CONTROL].causal()), uncached(model, ids(1)))
    same(generate(model, ids(1), assistant_model=family.causal()), uncached(model, ids(1)))


@job(GROUP, "assisted, as the assistant")
def assistant(family: Family, tmp: Path) -> None:
    from tests.seams.families import CONTROL, FAMILIES

    target = FAMILIES[CONTROL].causal()
    same(generate(target, ids(1), assistant_model=family.causal()), uncached(target, ids(1)))


@job(GROUP, "early exit: the first layers of the model are its assistant")
def early_exit(family: Family, tmp: Path) -> None:
    model = family.causal()
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    got = generate(model, ids(1), assistant_early_exit=1)
    assert calls.count(0) > calls.count(1), "the assistant ran every layer"
    same(got, uncached(model, ids(1)))


@job(GROUP, "prompt lookup")
def prompt_lookup(family: Family, tmp: Path) -> None:
    model = family.causal()
    prompt = ids(1, 4).repeat(1, 3)
    same(generate(model, prompt, prompt_lookup_num_tokens=2), uncached(model, prompt))


@job(GROUP, "contrastive search, as `penalty_alpha`")
def contrastive(family: Family, tmp: Path) -> None:
    generate(family.causal(), penalty_alpha=0.6, top_k=4)


@job(GROUP, "contrastive decoding, as a method of one's own (`custom_generate`)")
def custom_generate(family: Family, tmp: Path) -> None:
    def decode(model: Any, input_ids: Tensor, *_: Any, **model_kwargs: Any) -> Tensor:
        """Greedy on last minus first layer: like contrastive search it reads hidden states at each step."""
        use_cache, cache, step = model_kwargs["use_cache"], None, input_ids
        for _step in range(NEW):
            kwargs = {CACHE: cache} if use_cache else {}
            out = model(input_ids=step, use_cache=use_cache, output_hidden_states=True, **kwargs)
            scores = out.logits[:, -1] - model.lm_head(out.hidden_states[1][:, -1])
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], 1)
            cache, step = out.get(CACHE), input_ids[:, -1:] if use_cache else input_ids
        return input_ids

    model = family.causal()
    same(generate(model, custom_generate=decode), uncached(model, custom_generate=decode))


@job(GROUP, "guidance, token bans, suppressed tokens, processors and stopping criteria")
def processors(family: Family, tmp: Path) -> None:
    model = family.causal()
    first = int(uncached(model, ids(1))[0, 9])
    banned = LogitsProcessorList([lambda text, scores: scores.index_fill(1, torch.tensor([first]), -1e9)])
    options = {
        "logits_processor": banned,
        "guidance_scale": 1.5,
        "bad_words_ids": [[5, 6]],
        "suppress_tokens": [9],
    }
    got, want = generate(model, ids(1), **options), uncached(model, ids(1), **options)
    same(got, want)
    assert got[0, 9] != first


@job(GROUP, "end token: rows end by themselves and are padded")
def end_token(family: Family, tmp: Path) -> None:
    model = family.causal()
    end = int(uncached(model)[0, 9 + 3])
    options = {"eos_token_id": end, "min_new_tokens": 1, "stop_strings": None}
    got = generate(model, **options)
    same(got, uncached(model, **options))
    assert (got[0] == end).any()


@job(GROUP, "streaming")
def streaming(family: Family, tmp: Path) -> None:
    class Kept(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    tokenizer = byte_tokenizer()
    model = family.causal()
    streamer = Kept(tokenizer, skip_prompt=True)
    out = generate(model, ids(1), streamer=streamer, suppress_tokens=list(range(128, VOCAB)))
    assert streamer.text.strip() == tokenizer.decode(out[0, 9:]).strip()


def _cache_implementation(name: str) -> Any:
    def implementation(family: Family, tmp: Path) -> None:
        model = family.causal()
        same(generate(model, cache_implementation=name, disable_compile=True), uncached(model))

    implementation.__name__ = f"cache_{name}"
    return implementation


for _name in ("dynamic", "static", "offloaded", "offloaded_static"):
    job(GROUP, f'`cache_implementation="{_name}"`')(_cache_implementation(_name))


@job(
    GROUP,
    '`cache_implementation="quantized"`: most tokens are those of the exact cache',
    needs=("optimum-quanto",),
)
def cache_quantized(family: Family, tmp: Path) -> None:
    model = family.causal()
    options = {"backend": "quanto", "nbits": 4, "q_group_size": 16}
    got = generate(model, cache_implementation="quantized", cache_config=options)
    assert (got == uncached(model))[:, 9:].float().mean() > 0.5


@job(GROUP, "cache objects given: dynamic, with and without the configuration, static")
def cache_objects(family: Family, tmp: Path) -> None:
    model = family.causal()
    want = uncached(model)
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=40),
    ):
        same(generate(model, disable_compile=True, **{CACHE: cache}), want)


@job(GROUP, "a sliding-window cache longer than the text")
def sliding_cache(family: Family, tmp: Path) -> None:
    model = family.causal()
    same(generate(model, cache_implementation="sliding_window", disable_compile=True), uncached(model))


@job(GROUP, "chunked prefill")
def chunked_prefill(family: Family, tmp: Path) -> None:
    model = family.causal()
    prompt = ids(2, 11)
    same(generate(model, prompt, prefill_chunk_size=4), uncached(model, prompt))


@job(GROUP, "continuing from a cache: a second turn")
def continues_from_cache(family: Family, tmp: Path) -> None:
    model = family.causal()
    cache = DynamicCache(config=model.config)
    first = generate(model, **{CACHE: cache})
    assert cache.get_seq_length() == 9 + NEW - 1
    turn = torch.cat([first, ids(2, 5, seed=9)], 1)
    same(generate(model, turn, **{CACHE: cache}), uncached(model, turn))


@job(GROUP, "continuing from a prefix computed once, for several prompts")
def prefix_reused(family: Family, tmp: Path) -> None:
    model = family.causal()
    prefix = ids(1, 6)
    with torch.no_grad():
        cache = model(input_ids=prefix, use_cache=True).get(CACHE)
    for seed in (4, 5):
        prompt = torch.cat([prefix, ids(1, 3, seed=seed)], 1)
        same(generate(model, prompt, **{CACHE: copy.deepcopy(cache)}), uncached(model, prompt))


@job(GROUP, "a loop of one's own over the cache, by its new and its old name")
def cache_by_hand(family: Family, tmp: Path) -> None:
    model = family.causal()
    with torch.no_grad():
        want = model(input_ids=ids()).logits
        for name in {CACHE, "past_key_values"}:
            cache: Cache = DynamicCache(config=model.config)
            parts = []
            for part in (ids()[:, :4], ids()[:, 4:8], ids()[:, 8:]):
                out = model(input_ids=part, use_cache=True, **{name: cache})
                assert out.past_key_values is cache
                parts.append(out.logits)
            close(torch.cat(parts, 1), want, 1e-4)


@job(GROUP, "`inputs_embeds` as the prompt, with and without ids beside")
def from_embeddings(family: Family, tmp: Path) -> None:
    model = family.causal()
    embeds = model.get_input_embeddings()(ids())
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    want = uncached(model)[:, 9:]
    same(model.generate(inputs_embeds=embeds, attention_mask=torch.ones(2, 9), **options), want)
    same(model.generate(ids(), inputs_embeds=embeds, **options)[:, 9:], want)


@job(GROUP, "left padding: each row as alone")
def left_padding(family: Family, tmp: Path) -> None:
    model = family.causal()
    rows = [ids(1, 9), ids(1, 5, seed=2)]
    padded = torch.cat([rows[0], torch.cat([torch.full((1, 4), PAD), rows[1]], 1)])
    mask = (padded != PAD).long()
    want = torch.cat([uncached(model, row)[:, -NEW:] for row in rows])
    same(generate(model, padded, attention_mask=mask)[:, 9:], want)
    same(uncached(model, padded, attention_mask=mask)[:, 9:], want)
    same(
        generate(model, padded, attention_mask=mask, num_beams=2)[:, 9:],
        torch.cat([uncached(model, row, num_beams=2)[:, -NEW:] for row in rows]),
    )


@job(GROUP, "`generate_batch` (continuous batching)")
def continuous_batching(family: Family, tmp: Path) -> None:
    model = family.causal()
    prompts = [ids(1, 9)[0].tolist(), ids(1, 5, seed=2)[0].tolist()]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    few = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # the default takes most of the memory
    found = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=few)
    got = sorted(list(out.generated_tokens) for out in found.values())
    want = sorted(uncached(model, torch.tensor([prompt]))[0, -NEW:].tolist() for prompt in prompts)
    assert got == want, f"{got} instead of {want}"


@job(GROUP, "`generate` from a saved generation configuration")
def generation_configuration(family: Family, tmp: Path) -> None:
    model = family.causal()
    model.generation_config = GenerationConfig(
        max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=PAD
    )
    model.save_pretrained(tmp)
    loaded = type(model).from_pretrained(tmp)
    assert loaded.generation_config.max_new_tokens == 5
    same(loaded.generate(ids(), attention_mask=torch.ones_like(ids())), uncached(model)[:, : 9 + 5])


@job(GROUP, "a wrong keyword to `generate` is refused by name")
def wrong_keyword(family: Family, tmp: Path) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        generate(family.causal(), no_such_option=1)


@job(GROUP, "a static cache and a compiled decode step", slow=True)
def compiled(family: Family, tmp: Path) -> None:
    torch.compiler.reset()
    model = family.causal()
    want = uncached(model)
    model.forward = torch.compile(model.forward, dynamic=True, backend="eager")
    same(generate(model), want)
    same(generate(model, cache_implementation="static"), want)


@job(GROUP, "`torch.compile(fullgraph=True)` of the forward, outputs and gradients", slow=True)
def compiled_fullgraph(family: Family, tmp: Path) -> None:
    torch.compiler.reset()
    model = family.causal(experts_implementation="grouped_mm").train()
    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for net in (model, compiled_model):
        model.zero_grad()
        net(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        close(results[1][name], gradient, 1e-4)
