"""Small models for tests, in both published architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize

PRE = {"norm_position": "pre", "norm_type": "rmsnorm", "mlp_gated": True, "hidden_act": "silu"}
POST = {"norm_position": "post", "norm_type": "layernorm", "mlp_gated": False, "hidden_act": "relu"}


def config(**changes: Any) -> RMoEConfig:
    """Odd sizes throughout; pre-norm SwiGLU unless changed."""
    sizes = {
        "vocab_size": 67, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6,
        "num_hidden_layers": 3, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "initializer_range": 0.1,
    }  # fmt: skip
    return RMoEConfig(**{**PRE, **sizes, **changes})


def model(seed: int = 0, attention: str = "sdpa", experts: str = "eager", **changes: Any) -> RMoEForCausalLM:
    built = RMoEForCausalLM._from_config(
        config(**changes), attn_implementation=attention, experts_implementation=experts
    )
    initialize(built, seed)
    return built


def with_lora_on_experts(net: torch.nn.Module) -> Any:
    """PEFT's wrapper around the experts' own weights: an expert's weight is computed, no parameter."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        net,
        peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )


def tokens(batch: int = 3, length: int = 13, seed: int = 0, vocab: int = 67) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(
    net: torch.nn.Module, ids: torch.Tensor, **inputs: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    loss = net(ids, labels=ids, **inputs).loss
    loss.backward()
    named = {name.replace("_orig_mod.", ""): p for name, p in net.named_parameters()}
    return float(loss.detach()), {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def assert_same(
    got: tuple[float, dict[str, torch.Tensor]], want: tuple[float, dict[str, torch.Tensor]]
) -> None:
    """Loss within 1e-6, each gradient's norm error within 1e-5."""
    assert abs(got[0] - want[0]) < 1e-6
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), f"{name}: {error / gradient.norm()}"
