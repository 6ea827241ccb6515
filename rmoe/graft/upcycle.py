"""Sparse upcycling (arXiv:2212.05055): a dense Llama-like checkpoint becomes an RMoE model of the same function.

Every expert starts as a copy of its layer's MLP. Where a token's weights sum to one, the mixture of equal experts
is that MLP, whatever the router says; that, and not the router's name, is what is checked before anything is kept.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.routing.spec import RouterSpec

# Taken over as they are; the names are the same on both sides.
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of logits, relative to their largest; else 0.05


def upcycle(
    dense: PreTrainedModel,
    router: str | RouterSpec = "rmoe",
    *,
    num_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
) -> RMoEForCausalLM:
    """An RMoE model that computes what a dense model computes.

    Args:
        dense: a Llama, Mistral, Qwen2, or another model with the same layers under the same names.
        router: a zoo row, or a spec. One that need not renormalise its weights is made to.
        num_experts, top_k: `E` and `k`; each expert is as wide as the dense MLP.
        seed: of the router's initial values.

    Returns:
        The model, in the dense model's dtype and on its device.

    Raises:
        RequestError: layers that an RMoE model does not have, or a router with which the function is another.
    """
    config = _config(dense, router, num_experts, top_k)
    model = RMoEForCausalLM(config)
    initialize(model, seed)
    model.to(device=dense.device, dtype=dense.dtype)
    _copy_weights(dense, model)
    _require_same_function(dense, model.eval(), router)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model


def upcycle_folder(
    source: Path, out: Path, router: str = "rmoe", *, num_experts: int = 8, top_k: int = 2, seed: int = 0
) -> RMoEForCausalLM:
    """`upcycle` from folder to folder, the tokenizer with it. Raises as `upcycle` does, with nothing written."""
    from rmoe.graft.card import upcycling_card
    from rmoe.graft.files import copy_others, new_folder
    from rmoe.model.card import write_card
    from rmoe.model.loading import load

    model = upcycle(load(source), router, num_experts=num_experts, top_k=top_k, seed=seed)

    # transformers refuses to write some of the defaults that it reads.
    defaults, model.generation_config = model.generation_config, GenerationConfig()

    with new_folder(out) as folder:
        model.save_pretrained(folder)
        copy_others(source, folder)  # last: the dense model's generation defaults, as they are
        write_card(folder, upcycling_card(source, router, num_experts, top_k, model.num_parameters()))
    model.generation_config = defaults
    return model


def _config(dense: PreTrainedModel, router: str | RouterSpec, num_experts: int, top_k: int) -> RMoEConfig:
    old = dense.config
    if getattr(old, "use_sliding_window", False) or (
        getattr(old, "sliding_window", None) is not None and not hasattr(old, "use_sliding_window")
    ):
        raise RequestError(
            "model", old.model_type, "a model with full attention; this one has a sliding window"
        )
    fields: dict[str, Any] = {name: getattr(old, name) for name in _SAME_FIELDS if hasattr(old, name)}
    if len(fields) < len(_SAME_FIELDS) - 1:  # head_dim may be left to its default
        missing = sorted(set(_SAME_FIELDS) - fields.keys())
        raise RequestError(
            "model", old.model_type, f"a dense Llama-like model; its configuration lacks {missing}"
        )
    return RMoEConfig(
        **fields,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in dense.state_dict(),
        moe_intermediate_size=old.intermediate_size,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        router=router,
        norm_topk_prob=True,
    )


@torch.no_grad()
def _copy_weights(dense: PreTrainedModel, model: RMoEForCausalLM) -> None:
    """Copy everything but the router; each expert is its layer's MLP.

    Raises:
        RequestError: a weight on one side has no place on the other.
    """
    given: dict[str, Tensor] = dict(dense.state_dict())
    for name, target in model.state_dict().items():
        if ".mlp.experts." in name:
            layer = name.partition(".experts.")[0]
            parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            target.copy_(torch.cat([_take(given, f"{layer}.{part}.weight", dense) for part in parts]))
        elif name.endswith("o_proj.bias") and name not in given:
            target.zero_()  # Qwen2 has a bias on queries, keys and values alone
        elif ".mlp.gate." not in name and "router_shared." not in name:
            target.copy_(_take(given, name, dense))
    if given:
        raise RequestError("model", dense.config.model_type, f"a model without {sorted(given)[0]}")


def _take(given: dict[str, Tensor], name: str, dense: PreTrainedModel) -> Tensor:
    if name not in given:
        raise RequestError("model", dense.config.model_type, f"a dense Llama-like model with {name}")
    return given.pop(name)


@torch.no_grad()
def _require_same_function(dense: PreTrainedModel, model: PreTrainedModel, router: str | RouterSpec) -> None:
    training = dense.training
    dense.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(dense.config.vocab_size, (2, 32), generator=generator).to(dense.device)
    expected, found = dense(tokens).logits.float(), model(tokens).logits.float()
    dense.train(training)
    worst = (found - expected).abs().max() / expected.abs().max()
    if not worst <= _TOLERANCE.get(dense.dtype, 0.05):
        name = router if isinstance(router, str) else "the given one"
        allowed = (
            f"a router whose weights for a token sum to one; this one moves the logits by {worst.item():.2g}"
        )
        raise RequestError("--router", name, allowed)
