"""A tiny random model of each transformers MoE family, on which the recorder is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from tests.graft.tiny_families import tiny_model

COMMON = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
}


@dataclass(frozen=True)
class TinyFamily:
    """A way to build the model, and the sizes it then has: MoE layers, E, k, classes."""

    name: str
    build: Callable[[], nn.Module]
    layers: int
    experts: int
    top_k: int
    classes: int


def _builder(config: str, model: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **options}))
        for name, parameter in built.named_parameters():  # routers far from uniform, so that choices differ
            if "gate.weight" in name or "router" in name:
                nn.init.normal_(parameter, std=0.5)
        for name, buffer in built.named_buffers():
            if name.endswith(("e_score_correction_bias", "balancing_biases")):
                nn.init.normal_(buffer, std=0.05)
        built.config._experts_implementation = "eager"
        return built.eval()

    return build


_FAMILIES = (
    TinyFamily(
        "olmoe", _builder("OlmoeConfig", "OlmoeForCausalLM", num_experts=8, num_experts_per_tok=2), 3, 8, 2, 8
    ),
    TinyFamily("mixtral", _builder("MixtralConfig", "MixtralForCausalLM", num_local_experts=4), 3, 4, 2, 4),
    TinyFamily(
        "qwen2_moe",
        _builder(
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            mlp_only_layers=[0],
        ),
        *(2, 6, 2, 6),
    ),
    TinyFamily(
        "qwen3_moe",
        _builder(
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            head_dim=8,
        ),
        *(3, 8, 3, 8),
    ),
    TinyFamily(
        "deepseek_v2",
        _builder("DeepseekV2Config", "DeepseekV2ForCausalLM", topk_method="group_limited_greedy", **DEEPSEEK),
        *(2, 8, 3, 8),
    ),
    TinyFamily("deepseek_v3", _builder("DeepseekV3Config", "DeepseekV3ForCausalLM", **DEEPSEEK), 2, 8, 3, 8),
    TinyFamily(
        "gpt_oss",
        _builder("GptOssConfig", "GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        *(3, 4, 2, 4),
    ),
    TinyFamily(
        "granitemoe",
        _builder("GraniteMoeConfig", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
        *(3, 4, 2, 4),
    ),
    TinyFamily(
        "phimoe",
        _builder("PhimoeConfig", "PhimoeForCausalLM", num_local_experts=6, num_experts_per_tok=2),
        *(3, 6, 2, 6),
    ),
    TinyFamily(
        "jamba",
        _builder(
            "JambaConfig",
            "JambaForCausalLM",
            num_hidden_layers=4,
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
        ),
        *(2, 4, 2, 4),
    ),
    TinyFamily(
        "llama4",
        _builder(
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            num_local_experts=4,
            num_experts_per_tok=2,
            interleave_moe_layer_step=1,
            intermediate_size_mlp=32,
            head_dim=8,
            attention_chunk_size=32,
        ),
        *(3, 4, 2, 4),
    ),
    TinyFamily(
        "zaya",
        _builder(
            "ZayaConfig",
            "ZayaForCausalLM",
            num_experts=4,
            moe_intermediate_size=16,
            router_hidden_size=16,
            head_dim=8,
        ),
        *(3, 4, 1, 5),
    ),
)
TINY = {family.name: family for family in _FAMILIES}


def olmoe_of_equal_routers() -> nn.Module:
    """Every router reads the same input and has the same matrix: layers add nothing to the stream."""
    model = tiny_model("olmoe")
    layers = model.model.layers
    with torch.no_grad():
        for layer in layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight.copy_(layers[0].mlp.gate.weight)
    return model
