"""Rows of the zoo in words: what stages they have, what they carry, what they need. Imports no torch."""

from __future__ import annotations

from dataclasses import fields

from rmoe.routing.mechanisms import Linear, Recurrence, ResidualScores, Softmax
from rmoe.routing.spec import RouterSpec, StageSpec
from rmoe.routing.zoo import ZooRow


def _options(stage: StageSpec, *known: str) -> list[str]:
    """`name=value` of the options that differ from their default; what `known` names is shown elsewhere."""
    default = type(stage)()
    names = [option.name for option in fields(stage) if option.name not in known]
    return [f"{name}={value}" for name in names if (value := getattr(stage, name)) != getattr(default, name)]


def _described(name: str, options: list[str]) -> str:
    return f"{name}({', '.join(options)})" if options else name


def stages(spec: RouterSpec) -> dict[str, str]:
    """Stage -> mechanism, in the order a token meets them; stages that do nothing are left out.

    >>> from rmoe.routing.zoo import resolve
    >>> stages(resolve("rmoe-np"))
    {'recurrence': 'gru(p=128, carry=zero)', 'scorer': 'linear(init_std=inverse_sqrt)', 'gate': 'softmax'}
    """
    found: dict[str, str] = {}
    recurrence = spec.recurrence
    if isinstance(recurrence, Recurrence):
        implied = ("carry",) if recurrence.cell == "identity" else ()
        options = _options(recurrence, "cell", "width", *implied)
        found["recurrence"] = _described(recurrence.cell, [f"p={recurrence.width}", *options])
    stages_in_turn = (spec.scorer, None if spec.temperature.is_off else spec.temperature, spec.gate)
    for stage in stages_in_turn:
        if stage is not None:
            found[stage.stage] = _described(stage.kind, _options(stage))
    router = _described(spec.router.kind, _options(spec.router))
    if router != "staged":
        found["router"] = router
    return found


def equation(spec: RouterSpec) -> str:
    """The stages' formulas in order.

    >>> from rmoe.routing.zoo import resolve
    >>> equation(resolve("rmoe"))
    'h = GRU(P x, h); f = h; s = G f; g = top_k(softmax(s)) / sum'
    """
    if spec.scorer is None:
        return spec.router.equation
    parts = (spec.recurrence.equation, spec.scorer.equation, spec.router.equation)
    temperature = "" if spec.temperature.is_off else "s / T"
    gate = "" if spec.gate is None else spec.gate.equation
    return "; ".join(part for part in (*parts, temperature, gate) if part)


def balance(spec: RouterSpec) -> str:
    """How experts are kept equally busy."""
    parts = [loss.kind for loss in spec.balance.losses]
    if spec.balance.scope == "global_batch":
        parts.append("global batch")
    if spec.balance.bias_update_rate:
        parts.append(f"bias {spec.balance.bias_update_rate:g}")
    if spec.balance.capacity_factor is not None:
        parts.append(f"capacity {spec.balance.capacity_factor:g}")
    return ", ".join(parts) or "-"


def carries(spec: RouterSpec) -> str:
    """What travels from layer to layer, with its width per token."""
    parts = ["scores [E]"] if isinstance(spec.router, ResidualScores) else []
    recurrence = spec.recurrence
    if isinstance(recurrence, Recurrence) and recurrence.carry != "zero":
        detached = " (detached)" if recurrence.carry == "detached" else ""
        parts.append(f"{'h, c' if recurrence.cell == 'lstm' else 'h'} [{recurrence.width}]{detached}")
    if isinstance(spec.scorer, Linear) and spec.scorer.shared_layers != 1:
        group = "all" if spec.scorer.shared_layers == 0 else str(spec.scorer.shared_layers)
        parts.append(f"nothing; weights shared by {group} layers")
    return "; ".join(parts) or "-"


def needs(row: ZooRow) -> str:
    """What a row asks of the model and its training."""
    spec, parts = row.spec, []
    if row.top_k is not None:
        parts.append(f"k = {row.top_k}")
    if spec.router.needs_token_ids:
        parts.append("token ids")
    if not spec.is_causal:
        parts.append("whole batch: cannot generate")
    if spec.uses_noise:
        parts.append("noise in training")
    moves = spec.balance.bias_update_rate or spec.temperature.end or spec.temperature.target_entropy
    stateful = spec.router.kind == "stable" or (spec.gate is not None and spec.gate.kind == "relu")
    if moves or stateful or (isinstance(spec.gate, Softmax) and spec.gate.start_k is not None):
        parts.append("update after each step")
    return ", ".join(parts) or "-"
