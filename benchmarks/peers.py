"""Whom the model is compared with, at the same shapes and in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from benchmarks.sizes import Size
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize


class LoopExperts(nn.Module):
    """One module per expert and a Python loop over them, the form of the paper's public code (fastmoe without its
    kernels)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.num_experts = size.experts
        self.up = nn.ModuleList(
            nn.Linear(size.hidden, 2 * size.width, bias=False) for _ in range(size.experts)
        )
        self.down = nn.ModuleList(nn.Linear(size.width, size.hidden, bias=False) for _ in range(size.experts))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(index == expert)
            gate, linear = self.up[expert](x[token]).chunk(2, -1)
            inner = self.down[expert](nn.functional.silu(gate) * linear)
            out = out.index_add(0, token, inner * weights[token, slot, None])
        return out


def ours(
    size: Size, router: str, experts: str = "auto", dense_gradients: str | None = None
) -> RMoEForCausalLM:
    """Our model; `experts="loop"` is `LoopExperts`."""
    config = RMoEConfig(
        **_common(size), moe_intermediate_size=size.width, router=router, dense_gradients=dense_gradients
    )
    implementation = "eager" if experts == "loop" else experts
    model = RMoEForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation=implementation
    )
    initialize(model, 0)
    if experts == "loop":
        for layer in model.model.layers:
            layer.mlp.experts = LoopExperts(size)
    return model


def olmoe(size: Size, experts: str) -> OlmoeForCausalLM:
    """transformers' OLMoE; it has norms on queries and keys besides, and its balance loss is on, as ours is."""
    config = OlmoeConfig(**_common(size), **_plain(size), norm_topk_prob=True, output_router_logits=True)
    return OlmoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)


def mixtral(size: Size, experts: str) -> MixtralForCausalLM:
    """transformers' Mixtral, the same architecture as our `smoe`."""
    common = _common(size)
    experts_in_all = common.pop("num_experts")
    config = MixtralConfig(
        **common,
        **_plain(size),
        num_local_experts=experts_in_all,
        num_key_value_heads=size.heads,
        sliding_window=None,
        output_router_logits=True,
    )
    return MixtralForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)


def dense(size: Size) -> LlamaForCausalLM:
    """A dense model with as many parameters as are active for a token."""
    common = _common(size)
    del common["num_experts"], common["num_experts_per_tok"]
    config = LlamaConfig(
        **common, intermediate_size=size.top_k * size.width, pad_token_id=None, eos_token_id=None
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def _common(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "max_position_embeddings": max(4096, size.length),
    }


def _plain(size: Size) -> dict[str, Any]:
    return {"intermediate_size": size.width, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def training_step(
    model: Any, size: Size, device: str = "cpu", compiled: bool = False, bf16: bool = False
) -> Callable[[], Tensor]:
    """Forward, backward, fused AdamW and zeroing on one fixed batch; gives the loss, on its device."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(
        0, size.vocab, (size.batch, size.length), generator=torch.Generator().manual_seed(0)
    ).to(device)
    run = torch.compile(model) if compiled else model
    # As each family's own trainer calls it: ours takes the loss and keeps no logits.
    options = {"output_logits": False} if isinstance(model, RMoEForCausalLM) else {}

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss: Tensor = run(input_ids=ids, labels=ids, use_cache=False, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
