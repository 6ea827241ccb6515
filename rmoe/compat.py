"""Every name of another package that is private, renamed between releases, or not documented: here and nowhere else.

Each entry says in which releases it was seen. `tests/test_compat.py` fails on the day one of them goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.generic import merge_with_config_defaults  # not in `transformers.utils`; 5.17 to 5.24

__all__ = [
    "ATTENTION_KEYWORDS",
    "CACHE",
    "CACHE_NAMES",
    "HAS_ACTIVATION_CHECKPOINTING",
    "announce_causal_lm",
    "attention_keywords",
    "enable_checkpointing",
    "merge_with_config_defaults",
    "one_cache",
]

CACHE = "cache" if "cache" in signature(LlamaAttention.forward).parameters else "past_key_values"
"""The keyword of the key-value cache: `past_key_values` up to transformers 5.23, `cache` from 5.24."""

CACHE_NAMES = ("cache", "past_key_values")

HAS_ACTIVATION_CHECKPOINTING = hasattr(PreTrainedModel, "activation_checkpointing_enable")
"""transformers 5.24 renamed `gradient_checkpointing_enable`, which now warns and calls the new name."""

ATTENTION_KEYWORDS = frozenset(
    {
        # Variable-length attention and packing: `transformers.utils.TransformersKwargs`.
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "is_causal",
        "output_attentions",
        # Continuous batching (`generate_batch`): transformers' `PagedAttentionArgs`, 5.17 to 5.24.
        "read_index",
        "write_index",
        "logits_indices",
        "logits_processor_args",
        "block_table",
        # vLLM's transformers backend.
        "attention_instances",
        # flex attention.
        "kernel_options",
    }
)
"""Keywords that other programs give a decoder's forward for its attention to read."""


def attention_keywords(owner: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords to hand down to attention: those known, and any for a function that somebody else has registered.

    Raises:
        TypeError: a keyword that nobody below reads; it would be dropped in silence.
    """
    attention = ALL_ATTENTION_FUNCTIONS.get(owner.config._attn_implementation)
    of_transformers = attention is None or attention.__module__.startswith("transformers.")
    for name in given:
        if of_transformers and name not in ATTENTION_KEYWORDS:
            raise TypeError(f"{type(owner).__name__}.forward() got an unexpected keyword argument {name!r}")
    return dict(given)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache, whichever of its two names the caller used.

    Raises:
        TypeError: both names at once.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("give `cache` or `past_key_values`, not both: they are one argument")
    return past_key_values if cache is None else cache


def announce_causal_lm(model_type: str, class_name: str) -> None:
    """List a language model's class where transformers looks for language models by name.

    Trainer's label smoothing shifts labels, and the text-generation pipeline knows its models, by this table alone;
    `AutoModelForCausalLM.register` does not write into it (5.17 to 5.24).
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = class_name


def enable_checkpointing(model: Any) -> None:
    """Checkpoint a transformers model's layers, not reentrantly, under the name this release has for it."""
    if HAS_ACTIVATION_CHECKPOINTING:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
