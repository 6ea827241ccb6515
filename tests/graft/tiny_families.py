"""Which of transformers' MoE model types can be read and grafted, tried on tiny random models.

`python -m tests.graft.tiny_families` tries all of them and writes the table that `rmoe families` prints. Run it
after a new release of transformers, and copy the printed table into docs/families.md.

A tiny configuration comes from the family's own configuration class. Sizes are set by the names of its fields,
the same for every family; a field that a family does not have is skipped.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from rmoe.cli.families import FAMILIES as TABLE
from rmoe.cli.families import markdown_table
from rmoe.errors import RequestError, one_line
from rmoe.graft.attach import OFFSET, routed_stack
from rmoe.graft.auto import graft
from rmoe.graft.base import GRAFT_MODEL_TYPE
from rmoe.graft.spec import GraftSpec
from rmoe.moe import check_reading, routed_layers
from rmoe.routing.recurrence import Recurrence
from tests.versions import older

# The families the graft is promised for; the others are tried too.
PROMISED = (
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "minimax",
    "jamba",
    "llama4_text",
    # transformers 5.17 renames its kinds of layers when it saves a configuration of another model type
    *([] if older("transformers", "5.23") else ["lfm2_moe"]),
    "dots1",
)

_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
)

# Field name -> tiny value, for whichever of these a configuration has.
_TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "kv_channels": 8,
    "n_shared_experts": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **dict.fromkeys(_EXPERTS, 8),
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    # dense layers before, and between, the routed ones
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "interleave_moe_layer_step": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    # linear attention, state space and convolution layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "use_mamba_kernels": False,
    "block_size": 8,
    "enable_moe_block": True,
    # experts that return their input, layers that run more than once, a sliding window
    "zero_expert_num": 4,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "n_layers_per_attn_res_block": 1,
    "sliding_window": 64,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 4,
    "d_ff": 48,
    "ffn_hidden_size": 48,
    # token ids have to lie in the tiny vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Tried in this order, all families alike, until a model runs: not every family can have every size or layer.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"layer_types": ["linear_attention", "full_attention"] * 2},
    {"layer_types": ["linear_attention", "full_attention"] * 2, "num_key_value_heads": 4},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"num_experts_per_tok": 1, "num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
)

# The last one, a model without a head, is for text models whose heads belong to a larger, multimodal model.
_TASKS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_MAPPING)

TOKENS = torch.arange(3, 25).view(2, 11)


class NotTried(Exception):
    """Nothing is known of a family, because no tiny model of it runs; the text says why."""


@dataclasses.dataclass(frozen=True)
class FamilyResult:
    """One row of `rmoe families`. `note` is why it does not work, or what it is limited to."""

    model_type: str
    read: bool
    graft: bool
    note: str


def moe_model_types() -> list[str]:
    """Every MoE model type of the installed transformers, promised ones first; found by walking its models.

    A model type is one if its configuration, or a part of it, counts experts and its models speak of experts. One whose
    text model is a model type of its own has its row there.
    """
    own = {"rmoe", GRAFT_MODEL_TYPE}
    others = [t for t in CONFIG_MAPPING if t not in own.union(PROMISED) and _is_moe(CONFIG_MAPPING[t])]
    return [*PROMISED, *sorted(others)]


def _is_moe(config_class: type[PreTrainedConfig]) -> bool:
    parts = _parts(config_class)
    if any(part in CONFIG_MAPPING.values() and _expert_fields(part) for part in parts.values()):
        return False
    if not any(_expert_fields(part) for part in (config_class, *parts.values())):
        return False
    found = importlib.util.find_spec(modeling_module(config_class))
    return found is not None and "expert" in Path(str(found.origin)).read_text().lower()


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The configurations nested in one, but those of any type (`AutoConfig`)."""
    found = config_class.sub_configs.items()
    return {
        name: part for name, part in found if isinstance(part, type) and issubclass(part, PreTrainedConfig)
    }


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)


def _expert_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    return _fields(config_class) & set(_EXPERTS)


def tiny_model(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of a family at a few thousand parameters, gates and their biases random too, in evaluation mode.

    Raises:
        NotTried: no variant of the tiny sizes gives a model that runs; says what the first one failed with.
        RequestError: the model cannot be grafted.
    """
    failures = []
    for variant in _VARIANTS:
        try:
            model = _random_model(_tiny_config(model_type, variant), seed).to(dtype).eval()
            with torch.no_grad():
                model(**tiny_inputs(model))
        except (RequestError, NotTried):
            raise
        except Exception as error:  # whatever a family's own code says to sizes it cannot have
            failures.append(one_line(f"{type(error).__name__}: {error}"))
        else:
            return model
    raise NotTried(f"not tried: its tiny random model does not run here: {failures[0]:.120}")


def tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Token ids, `[2, 11]`."""
    return {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {})


def model_class_of(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """The language model of a configuration; without one in the Auto classes, whichever its module builds from it."""
    for mapping in _TASKS:
        if config_class in mapping:
            found = mapping[config_class]
            return found[0] if isinstance(found, tuple) else found
    try:
        module = importlib.import_module(modeling_module(config_class))
    except ImportError:
        return None
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and inspect.signature(value.__init__).parameters["config"].annotation
        in (config_class, config_class.__name__)
        and "input_ids" in inspect.signature(value.forward).parameters
    ]
    return min(own, key=lambda value: len(value.__mro__), default=None)


def modeling_module(config_class: type) -> str:
    """Name of the module with the models of a configuration."""
    return config_class.__module__.replace(".configuration_", ".modeling_")


def _tiny_config(model_type: str, variant: dict[str, Any]) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    return _tiny(config_class, _TINY | variant)


def _tiny(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> PreTrainedConfig:
    own = {name: value for name, value in sizes.items() if name in _fields(config_class)}
    parts = {name: _tiny(part, sizes) for name, part in _parts(config_class).items() if _expert_fields(part)}
    return config_class(**own | parts)


def _random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    model_class = model_class_of(type(config))
    if model_class is None:
        raise NotTried("not tried: a part of another model type, without a model of its own in transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # Some families leave gates, or everything, at zero: all tokens take the same experts.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(0.0, 0.02)
            for layer in routed_layers(model):
                for tensor in layer.gate.state_dict(keep_vars=True).values():
                    if tensor.is_floating_point():
                        tensor.normal_(0.0, 0.5)
    return model


def try_family(model_type: str) -> FamilyResult:
    """Read and graft tiny random models of a family, in float32 and bfloat16."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                models = [tiny_model(model_type)]
                with suppress(NotTried):  # some keep weights in float32 whatever the rest is
                    models.append(tiny_model(model_type, dtype=torch.bfloat16))
            except (
                Exception
            ) as error:  # a family may fail in any way of its own; the list goes on and says how
                why = f"needs {error.allowed}" if isinstance(error, RequestError) else str(error)
                return FamilyResult(model_type, False, False, one_line(why)[:200])
            read, grafted = (
                next((why for model in models if (why := _reason(trial, model))), "")
                for trial in (unread, _differs)
            )
            if read == grafted:
                return FamilyResult(model_type, not read, not grafted, read or _limit(models[0]))
            notes = [f"{verb}: {why}" for verb, why in (("read", read), ("graft", grafted)) if why]
            return FamilyResult(model_type, not read, not grafted, "; ".join(notes))
    finally:
        logging.set_verbosity(verbosity)


def _reason(trial: Callable[[PreTrainedModel], str], model: PreTrainedModel) -> str:
    try:
        return trial(model)
    except RequestError as error:
        return f"needs {error.allowed}"
    except Exception as error:
        return one_line(f"{type(error).__name__}: {error}")[:200]


def unread(model: PreTrainedModel) -> str:
    """Read a tiny model and silence every expert; what was wrong, empty if nothing."""
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    check = check_reading(model, ids, per_layer=1000)
    return "" if check.passed and check.experts else check.summary


def _limit(model: PreTrainedModel) -> str:
    """What a graft that works does not reach."""
    backbone = model.get_submodule(routed_stack(model)[0].stack.rpartition(".")[0])
    if "deepstack_visual_embeds" in inspect.signature(backbone.forward).parameters:
        return "text alone: this family adds image features between layers, which stops with an error"
    return ""


def _differs(model: PreTrainedModel) -> str:
    """What a graft changed that it should not have, or left undone; empty if nothing."""
    grafted = graft(copy.deepcopy(model), GraftSpec(recurrence=Recurrence.Config(width=8)))
    with torch.no_grad():
        before = model(**tiny_inputs(model))[0]
    after = grafted(**tiny_inputs(model))[0]
    if not torch.equal(before, after):
        return f"outputs differ by {(before - after).abs().max().item():.3g}"
    after.float().square().mean().backward()
    silent = [n for n, p in grafted.named_parameters() if n.endswith(f"{OFFSET}.B") and not _has_gradient(p)]
    return f"no gradient reaches {', '.join(silent)}" if silent else ""


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


def try_families() -> list[FamilyResult]:
    """`try_family` for every MoE model type found."""
    return [try_family(model_type) for model_type in moe_model_types()]


def main() -> None:
    """Write `rmoe/moe/families.json` and print its table."""
    rows = [dataclasses.asdict(row) for row in try_families()]
    table = {"transformers": transformers.__version__, "promised": len(PROMISED), "families": rows}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown_table(rows), end="")


if __name__ == "__main__":
    main()
