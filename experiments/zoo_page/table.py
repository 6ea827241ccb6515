"""The table that `rmoe zoo` prints from: every row in words, and its cost and scale at the paper's medium size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.zoo_page import ideas, shipped
from experiments.zoo_page.cost import MEDIUM, router_cost
from experiments.zoo_page.logit_scale import initial_logit_std
from rmoe.routing.describe import equation, stages
from rmoe.routing.spec import RouterSpec
from rmoe.routing.zoo import ZOO, ZooRow


def measured() -> dict[str, Any]:
    """The table as the code has it: every row described, built and measured."""
    sizes = ("num_layers", "hidden_size", "num_experts", "top_k", "vocab_size")
    return {
        "sizes": {name: getattr(MEDIUM, name) for name in sizes},
        "ideas": {idea.title: idea.text for idea in ideas.IDEAS},
        "routers": {name: _described(name, row) for name, row in ZOO.items()},
        "options": [option._asdict() for option in ideas.OPTIONS],
        "without": [mechanism._asdict() for mechanism in ideas.WITHOUT],
        "transformers": {"release": shipped.RELEASE, "classes": shipped.table()},
    }


def _described(name: str, row: ZooRow) -> dict[str, Any]:
    spec, geometry = row.spec, replace(MEDIUM, top_k=row.top_k or MEDIUM.top_k)
    carried, cost, scale = carries(spec), router_cost(spec, geometry), initial_logit_std(spec, geometry)
    return {
        "summary": row.summary,
        "source": row.source,
        "stages": stages(spec),
        "equation": equation(spec),
        "balance": spec.balance.described() or "-",
        "carries": carried,
        "needs": needs(row),
        "spec": spec.to_dict(),
        "idea": ideas.of(name, spec, carried).title,
        "parameters": cost.parameters,
        "flops_per_token": cost.flops_per_token,
        "initial_logit_std": None if scale is None else float(f"{scale:.2g}"),
    }


def carries(spec: RouterSpec) -> str:
    """What travels from layer to layer, with its width per token."""
    order = (spec.router, spec.recurrence, spec.scorer)
    return "; ".join(stage.carries for stage in order if stage is not None and stage.carries) or "-"


def needs(row: ZooRow) -> str:
    """What a row asks of the model and its training."""
    spec = row.spec
    parts = {
        f"k = {row.top_k}": row.top_k is not None,
        "token ids": spec.router.needs_token_ids,
        "whole batch: cannot generate": not spec.is_causal,
        "earlier tokens: cannot generate": spec.is_causal and not spec.generates,
        "tokens of a call compete": spec.balance.capacity_factor is not None,
        "noise in training": spec.uses_noise,
        "update after each step": any(stage.moves for stage in spec.stages()),
    }
    return ", ".join(part for part, needed in parts.items() if needed) or "-"
