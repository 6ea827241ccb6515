"""A tiny RMoE model with any router."""

from __future__ import annotations

from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize

LAYERS, EXPERTS, TOP_K = 3, 4, 2


def tiny_rmoe(router: str = "rmoe", seed: int = 0, **options: object) -> RMoEForCausalLM:
    """Three MoE layers above a dense one, in evaluation mode."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": LAYERS + 1,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "router": router,
    }
    model = RMoEForCausalLM(RMoEConfig(**{**sizes, **options}))
    initialize(model, seed)
    return model.eval()
