"""Rows of the zoo in words: what stages they have, what they carry, what they need."""

from __future__ import annotations

from typing import Any

from rmoe.routing.spec import RouterSpec
from rmoe.routing.zoo import ZooRow


def stages(spec: RouterSpec) -> dict[str, str]:
    """Stage -> mechanism, in the order a token meets them; stages that do nothing are left out.

    >>> from rmoe.routing.zoo import resolve
    >>> stages(resolve("rmoe-np"))
    {'recurrence': 'gru(p=128, carry=zero)', 'scorer': 'linear(init_std=inverse_sqrt)', 'gate': 'softmax'}
    """
    temperature = None if spec.temperature.is_off else spec.temperature
    order = (spec.recurrence, spec.scorer, temperature, spec.gate, spec.router)
    return {stage.stage: text for stage in order if stage is not None and (text := stage.described())}


def equation(spec: RouterSpec) -> str:
    """The stages' formulas in order.

    >>> from rmoe.routing.zoo import resolve
    >>> equation(resolve("rmoe"))
    'h = GRU(P x, h); f = h; s = G f; g = top_k(softmax(s)) / sum'
    """
    if spec.scorer is None:
        return spec.router.equation
    return "; ".join(stage.equation for stage in spec.stages() if stage.equation)


def balance(spec: RouterSpec) -> str:
    """How experts are kept equally busy."""
    return spec.balance.described() or "-"


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


def row(row: ZooRow) -> dict[str, Any]:
    """All of it, as JSON values."""
    spec = row.spec
    return {
        "summary": row.summary,
        "source": row.source,
        "stages": stages(spec),
        "equation": equation(spec),
        "balance": balance(spec),
        "carries": carries(spec),
        "needs": needs(row),
        "spec": spec.to_dict(),
    }
