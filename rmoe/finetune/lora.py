"""LoRA through PEFT: adapters on attention and on the experts' 3-D weights, routers trained whole or frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rmoe.errors import RequestError
from rmoe.finetune.config import FinetuneConfig
from rmoe.finetune.parts import router_parts


def with_lora(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """Wrap a model for PEFT. What is trained is float32, the rest stays in its own dtype.

    Args:
        config: `lora_rank`, `lora_alpha`; `freeze` decides which parts of the router train beside the adapters, which
            start as `seed` draws them.

    Raises:
        RequestError: PEFT is not installed, or the model has nothing that LoRA is put on.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RequestError("--lora-rank", config.lora_rank, "0, or pip install 'rmoe[finetune]'") from None
    parts = router_parts(model)
    trained = tuple(parts.every - parts.frozen(config.freeze))
    saved = [path for path in parts.modules if any(name.startswith(f"{path}.") for name in trained)]
    if config.task == "classification":
        saved.append("score")
    linear, stacked = _attention(model, parts.every), _experts(model)
    if not linear and not stacked:
        allowed = f"0: a {type(model).__name__} has no linear maps and no stacked experts"
        raise RequestError("--lora-rank", config.lora_rank, allowed)
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=linear,
        target_parameters=stacked,
        modules_to_save=saved or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapted = get_peft_model(model, adapters)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT copies a bfloat16 router as it is
            parameter.data = parameter.data.float()
    return adapted


def _attention(model: nn.Module, routers: frozenset[str]) -> list[str]:
    """Paths of all linear maps but experts, routers and heads."""
    heads = ("lm_head", "score")
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(name.startswith(f"{path}.") for name in routers)
        and ".experts." not in path
        and path.rpartition(".")[2] not in heads
    ]


def _experts(model: nn.Module) -> list[str]:
    """Paths of the experts' 3-D weights."""
    return [name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name]
