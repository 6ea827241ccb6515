"""Prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from benchmarks import peers
from benchmarks.cases.registry import COMPILED, Contestants, Setting, case
from benchmarks.cases.step import MODELS
from benchmarks.contestant import Contestant, Work
from benchmarks.sizes import FLOAT, Size

PROMPT, POSITIONS = 64, 256
"""Tokens before the one decoded, and room in the static cache."""

DECODERS: dict[str, Callable[[Size], Any]] = {
    **{name: MODELS[name] for name in ("smoe", "rmoe", "OLMoE grouped_mm", "OLMoE eager")},
    "OLMoE batched_mm": partial(peers.olmoe, experts="batched_mm"),
    "Mixtral grouped_mm": MODELS["Mixtral grouped_mm"],
}
BATCHED_AT_MOST = 8
"""`batched_mm` copies an expert's weights for every token."""


@case("prefill", "tests/model")
def prefill(setting: Setting) -> Contestants:
    """A forward pass without gradients, logits of the last position."""
    size = setting.size

    def contestant(name: str, compiled: bool = False) -> Contestant:
        flops = size.forward_flops("rmoe" if name == "rmoe" else "smoe", size.batch)
        work = Work(flops, FLOAT * size.parameters())
        return Contestant(partial(_prefill, name, setting, compiled), (work,), size.tokens)

    names = ("smoe", "rmoe", "OLMoE grouped_mm", "OLMoE eager", "Mixtral grouped_mm")
    compiled = ("smoe", "OLMoE grouped_mm")
    return {name: contestant(name) for name in names} | {
        name + COMPILED: contestant(name, compiled=True) for name in compiled
    }


def _prefill(name: str, setting: Setting, compiled: bool) -> Callable[[], object]:
    size, model = setting.size, _for_inference(MODELS[name], setting)
    ids = torch.randint(0, size.vocab, (size.batch, size.length), generator=torch.Generator().manual_seed(0))
    ids, forward = ids.to(setting.device), torch.compile(model) if compiled else model

    @torch.no_grad()
    def call() -> None:
        forward(input_ids=ids, use_cache=False, logits_to_keep=1)

    return call


def _for_inference(make: Callable[[Size], Any], setting: Setting) -> Any:
    model = make(setting.size).eval().to(setting.device)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False
    return model.to(torch.bfloat16) if setting.bf16 else model


def _decode(batch: int, setting: Setting) -> Contestants:
    """One more token for each of some sequences of 64, in a static cache of 256 positions.

    The least traffic: the weights that so many tokens are sure to need, and the cache of the positions seen.
    """
    size = setting.size

    def contestant(name: str, compiled: bool) -> Contestant:
        router = size.router_flops("rmoe" if name == "rmoe" else "smoe")
        flops = size.attention_flops(PROMPT) + size.expert_flops() + router + 2 * size.hidden * size.vocab
        nbytes = FLOAT * size.parameters(batch) + size.cache_bytes(batch, PROMPT)
        work = Work(batch * flops, nbytes / (2 if setting.bf16 else 1))
        return Contestant(partial(_decode_step, name, batch, setting, compiled), (work,), batch)

    names = [name for name in DECODERS if batch <= BATCHED_AT_MOST or "batched" not in name]
    compiled = [name for name in names if name not in ("OLMoE eager", "Mixtral grouped_mm")]
    return {name: contestant(name, False) for name in names} | {
        name + COMPILED: contestant(name, True) for name in compiled
    }


for _batch in (1, 8, 64):
    case(f"decode {_batch}", "tests/model")(partial(_decode, _batch))


def _decode_step(name: str, batch: int, setting: Setting, compiled: bool) -> Callable[[], object]:
    model = _for_inference(DECODERS[name], setting)
    cache = StaticCache(config=model.config, max_cache_len=POSITIONS)
    ids = torch.randint(0, setting.size.vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    position = torch.full((batch, 1), PROMPT, device=setting.device)
    forward = torch.compile(model, fullgraph=True) if compiled else model
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def call() -> None:
        # The same position again and again: every call does the same work.
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        forward(input_ids=ids[:, :1], position_ids=position, past_key_values=cache, use_cache=True)

    return call
