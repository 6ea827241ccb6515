"""Rows of the zoo in words: what stages they have, what they carry, what they need. Imports no torch."""

from __future__ import annotations

from rmoe.routing.mechanisms import Linear, Recurrence, ResidualScores, Softmax
from rmoe.routing.spec import RouterSpec, StageSpec
from rmoe.routing.zoo import ZooRow


def _with_changes(stage: StageSpec, *options: str) -> str:
    """A mechanism's kind and those of its options that differ from the default."""
    default = type(stage)()
    changed = {
        name: getattr(stage, name) for name in options if getattr(stage, name) != getattr(default, name)
    }
    details = ", ".join(f"{name}={value}" for name, value in changed.items())
    return f"{stage.kind}({details})" if details else stage.kind


def stages(spec: RouterSpec) -> dict[str, str]:
    """Stage -> mechanism, in the order a token meets them; stages that do nothing are left out.

    >>> from rmoe.routing.zoo import resolve
    >>> stages(resolve("rmoe-np"))
    {'recurrence': 'gru(p=128, carry=zero)', 'scorer': 'linear(init_std=inverse_sqrt)', 'gate': 'softmax'}
    """
    found: dict[str, str] = {}
    recurrence = spec.recurrence
    if isinstance(recurrence, Recurrence):
        options = [f"p={recurrence.width}"]
        for name in ("projector", "carry", "truncate_every", "normalize", "concat_hidden"):
            value = getattr(recurrence, name)
            if (value != getattr(Recurrence(), name) and recurrence.cell != "identity") or value is True:
                options.append(f"{name}={value}")
        found["recurrence"] = f"{recurrence.cell}({', '.join(options)})"
    if spec.scorer is not None:
        found["scorer"] = _with_changes(spec.scorer, *spec.scorer.__dataclass_fields__)
    if not spec.temperature.is_off:
        found["temperature"] = _with_changes(spec.temperature, *spec.temperature.__dataclass_fields__)
    if spec.gate is not None:
        found["gate"] = _with_changes(spec.gate, *spec.gate.__dataclass_fields__)
    if spec.router.kind != "staged" or spec.uses_noise:
        found["router"] = _with_changes(spec.router, *spec.router.__dataclass_fields__)
        if found["router"] == "staged":
            del found["router"]
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
