"""Every name of another package that is private, renamed between releases, or not documented: here and nowhere else.

Each entry says in which releases it was seen. `tests/test_compat.py` fails on the day one of them goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any
from unittest import mock

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode  # torch 2.11 to 2.14
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.core_model_loading import (  # 5.17 to 5.24
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations.moe import _default_apply_gate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.generic import (  # not in `transformers.utils`; 5.17 to 5.24
    merge_with_config_defaults as merge_with_config_defaults,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

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
        "max_seqlen_q",  # as continuous batching called them in 5.17
        "max_seqlen_k",
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

    PEFT's prefix tuning gives both: `generate`'s, and its prefix. The newer name wins, as in transformers, unless that
    cache is still empty: then the prefix is what to begin with.
    """
    if cache is None or (past_key_values is not None and cache.get_seq_length() == 0):
        return past_key_values
    return cache


def announce_causal_lm(model_type: str, class_name: str) -> None:
    """List a language model's class where transformers looks for language models by name.

    Trainer's label smoothing shifts labels, and the text-generation pipeline knows its models, by this table alone;
    `AutoModelForCausalLM.register` does not write into it (5.17 to 5.24).
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = class_name


def model_classes(config_class: type) -> Iterator[tuple[Any, Any]]:
    """(Auto class, model class) for everything any Auto class has for this configuration; seen in 5.17 to 5.24."""
    for name in modeling_auto.__all__:
        auto = getattr(transformers, name)
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and config_class in mapping:
            found = mapping[config_class]
            yield from (
                (auto, model_class) for model_class in (found if isinstance(found, tuple) else (found,))
            )


def keep_recording(model: Any) -> None:
    """Router logits and hidden states stay recorded when a model's class has changed: they are looked up by it.

    5.17 has a plain dict with class names as keys; 5.24 one that takes a model.
    """
    key = str(type(model)) if type(_CAN_RECORD_REGISTRY) is dict else model
    _CAN_RECORD_REGISTRY[key] = model._can_record_outputs


def is_loaded(what: Tensor | nn.Module) -> bool:
    """Whether transformers has filled a tensor, or all of a module, from a checkpoint; 5.17 to 5.24."""
    return bool(getattr(what, "_is_hf_initialized", False))


def is_split_by_plan(module: nn.Module) -> bool:
    """Whether a tensor-parallel plan of transformers has put hooks on a module; 5.17 to 5.24."""
    return bool(getattr(module, "_is_hooked", False))


def is_replica(module: nn.Module) -> bool:
    """Whether `torch.nn.DataParallel` made a module as a copy for one device; torch 2.11 to 2.14."""
    return bool(getattr(module, "_is_replica", False))


def accept_empty_slots(experts: Any) -> None:
    """Let transformers' experts kernels take index `E` as an empty slot, as under expert parallelism; 5.17 to 5.24."""
    experts._is_expert_parallel = True


def has_default_gate(experts: Any) -> bool:
    """Whether experts activate as `act(gate) * up`, transformers' own way; 5.17 to 5.24."""
    return type(experts)._apply_gate is _default_apply_gate


def plain_forward(experts: Any) -> Any:
    """The forward that `use_experts_implementation` has wrapped; 5.17 to 5.24."""
    return type(experts).forward.__wrapped__


def forget_accelerators() -> None:
    """Let the next Accelerator of this process be on another device or of another precision; accelerate 1.12 to 1.15.

    It keeps both in class attributes and raises on a change. A process group is left as it is.
    """
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def kept_accelerators() -> Iterator[None]:
    """Accelerators made before work afterwards as they did, whatever is made within; accelerate 1.12 to 1.15.

    Device, precision and gradient accumulation are class attributes: an Accelerator reads those of the last one made.
    """
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state.clear()
            state.update(values)


def prune_expert_plan(model: Any, keep: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Drop rules from a model's expert-parallel plan; 5.17 to 5.24."""
    model._ep_plan = keep(model._ep_plan or {})


def prune_fsdp_plan(model: Any, modules: Collection[str]) -> None:
    """Drop modules from a model's FSDP2 plan, whose property 5.17 cannot set; 5.17 to 5.24."""
    model._fsdp_plan = {name: style for name, style in model._fsdp_plan.items() if name not in modules}


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share a storage, and for no others alive; fake tensors have no address."""
    return int(tensor.untyped_storage()._cdata)


def grouped_products_in_python() -> AbstractContextManager[Any]:
    """transformers' stand-in for torch's grouped product, which without data takes bfloat16 only; 5.17 to 5.24."""
    return mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False)


def enable_checkpointing(model: Any) -> None:
    """Checkpoint a transformers model's layers, not reentrantly, under the name this release has for it."""
    if HAS_ACTIVATION_CHECKPOINTING:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


class LaterWeights:
    """What transformers had prepared when it was about to load a checkpoint: see `weights_later`. 5.17 to 5.24.

    Attributes:
        model: with quantised modules in place, its parameters on the meta device.
        target: checkpoint name -> name of the parameter that it becomes, or becomes a part of.
        tensors: checkpoint name -> a slice that is read when it is used.
    """

    model: PreTrainedModel
    target: dict[str, str]
    tensors: dict[str, Any]
    _config: Any

    def take(
        self, model: Any, state_dict: dict[str, Any], load_config: Any, disk_offload_index: Any = None
    ) -> tuple[Any, Any]:
        """Stands in for `convert_and_load_state_dict_in_model`: loads nothing, and says what would be missing."""
        nothing, _ = convert_and_load_state_dict_in_model(model, {}, load_config)
        self.model, self.tensors, self._config = model, dict(state_dict), load_config
        names = model.state_dict()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor._is_hf_initialized = True  # nothing is to be drawn at random
        mapping = load_config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        becomes = {
            pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns
        }
        self.target, filled = {}, set()
        for key in self.tensors:
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
            if name not in names and key in names:
                name, pattern = key, None
            if name in names:
                self.target[key] = name
                patterns = [""] if pattern is None else becomes[pattern]
                filled |= {name.replace(patterns[0], other) if patterns[0] else name for other in patterns}
            else:
                nothing.unexpected_keys.add(key)
        nothing.missing_keys = {name for name in names if name not in filled}
        return nothing, disk_offload_index

    def load(self, keys: list[str], device: torch.device) -> None:
        """Read these tensors, convert them as transformers does, and put them into the model.

        Raises:
            RuntimeError: the conversion of one fails.
        """
        config = replace(self._config, device_map={"": device})
        chosen = {key: self.tensors[key] for key in keys}
        # Not in threads, which read all of a layer before any of it is joined.
        with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
            found, _ = convert_and_load_state_dict_in_model(self.model, chosen, config)
        if found.conversion_errors or found.mismatched_keys:
            first = next(iter((*found.conversion_errors.items(), *found.mismatched_keys)))
            raise RuntimeError(f"{first}")


@contextmanager
def weights_later() -> Iterator[LaterWeights]:
    """Within, `from_pretrained` makes the model as always, but its weights stay on the meta device until asked for.

    Files are read by `pread`: a mapping of a whole checkpoint counts against a limit on the process's memory.
    """
    later = LaterWeights()
    with (
        mock.patch.object(modeling_utils, "convert_and_load_state_dict_in_model", later.take),
        mock.patch.object(modeling_utils, "safe_open", _opened),
    ):
        yield later


def _opened(filename: Any, framework: str, device: Any = "cpu", backend: str | None = None) -> Any:
    return safe_open(filename, framework=framework, device="cpu", backend="pread")


def takes_lengths(config: PreTrainedConfig) -> bool:
    """Whether attention is FlashAttention's, of any version: it takes lengths of sequences, and no mask of pairs."""
    return "flash" in str(config._attn_implementation)


def decode_by(streamer: object, text: object) -> None:
    """Have transformers' `DirectStreamer` decode tokens by `text.step(backend, token)`; 5.17 to 5.24."""
    if not hasattr(streamer, "_decode_stream"):
        raise AttributeError("DirectStreamer keeps its decoder elsewhere: see rmoe/compat.py")
    streamer._decode_stream = text


def stream_error(message: str) -> object:
    """What ends a stream of transformers' server with an error; 5.17 to 5.24. Needs the extra `serve`."""
    from transformers.cli.serving.utils import _StreamError

    return _StreamError(message)
