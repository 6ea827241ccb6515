"""A router in words: its stages and its equation."""

from __future__ import annotations

from rmoe.routing.spec import RouterSpec


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
