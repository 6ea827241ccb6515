"""AdamW and its learning rates, from a run's settings."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from rmoe.parallel.sharding import by_mesh
from rmoe.training.config import TrainingConfig

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of parameters without weight decay: biases and what belongs to a norm, as everywhere in transformers."""


def adamw(model: nn.Module, training: TrainingConfig, routers: list[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW over the trained parameters, in groups.

    The groups are: with weight decay, without; each again by device mesh where a model is cut over several (one fused
    kernel cannot span two); and the routers' own where they have a rate of their own. Checkpoints name them.

    Args:
        model: on its device.
        routers: parameters that `training.router_learning_rate` is for.
    """
    undecayed = _undecayed(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        members = [p for name, p in trained if (name not in undecayed) == decays]
        decay = training.weight_decay if decays else 0.0
        groups += [{"params": cut, "weight_decay": decay} for cut in by_mesh(members) or [[]]]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
    if training.router_learning_rate is not None:
        _split_groups(optimizer, routers, training.router_learning_rate)
    return optimizer


def _undecayed(model: nn.Module) -> set[str]:
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if UNDECAYED.search(name.lower()) or name.startswith(norms)}


def _split_groups(optimizer: torch.optim.Optimizer, members: list[nn.Parameter], rate: float) -> None:
    """Move `members` into groups of their own, with the settings of the group they were in and another rate."""
    chosen = {id(parameter) for parameter in members}
    for group in list(optimizer.param_groups):
        inside = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if inside:
            optimizer.add_param_group({**group, "params": inside, "lr": rate})


def schedule(
    optimizer: torch.optim.Optimizer, training: TrainingConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over `steps` optimizer steps: `training.schedule`, after `training.warmup_steps`."""
    low, peak = training.min_learning_rate, training.learning_rate
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("constant_with_warmup", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr": low}),
        "linear": ("polynomial", {"lr_end": low, "power": 1.0}),
        "wsd": (
            "warmup_stable_decay",
            {"num_decay_steps": training.decay_steps, "decay_type": "linear", "min_lr_ratio": low / peak},
        ),
    }
    name, options = schedules[training.schedule]
    found: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, optimizer, training.warmup_steps, steps, scheduler_specific_kwargs=options
    )
    return found
