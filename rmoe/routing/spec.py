"""A router as data: one mechanism per stage, strictly validated, round-tripping through JSON's values."""
# ruff: noqa: RUF009 (defaults are frozen)

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rmoe.errors import RequestError
from rmoe.routing.balance import BalanceSpec
from rmoe.routing.gate import Gate, Softmax
from rmoe.routing.options import Geometry, Options
from rmoe.routing.recurrence import BaseRecurrence, NoRecurrence
from rmoe.routing.router import BaseRouter, Router
from rmoe.routing.scorer import Linear, Scorer
from rmoe.routing.temperature import Temperature
from rmoe.validation import require

_STAGES: dict[str, type[Options]] = {
    "router": BaseRouter.Config,
    "recurrence": BaseRecurrence.Config,
    "scorer": Scorer.Config,
    "gate": Gate.Config,
    "temperature": Temperature.Config,
    "balance": BalanceSpec,
}


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """One router: a mechanism per stage. Two specs are the same router exactly when they are equal.

    >>> from rmoe.routing.zoo import resolve
    >>> spec = resolve("rmoe")
    >>> spec.recurrence.width, spec.scorer.kind, spec.gate.kind
    (128, 'linear', 'softmax')
    >>> RouterSpec.from_dict(spec.to_dict()) == spec
    True

    Raises:
        RequestError: a stage is missing, superfluous, or of the wrong type.
    """

    router: BaseRouter.Config = Router.Config()
    recurrence: BaseRecurrence.Config = NoRecurrence.Config()
    scorer: Scorer.Config | None = Linear.Config()
    gate: Gate.Config | None = Softmax.Config()
    temperature: Temperature.Config = Temperature.Config()
    balance: BalanceSpec = BalanceSpec()

    def __post_init__(self) -> None:
        for name, kind in _STAGES.items():
            value = getattr(self, name)
            fits = isinstance(value, kind) or (value is None and name in ("scorer", "gate"))
            require(fits, f"router.{name}", value, f"the options of a {name}")
        for name, used in (("scorer", self.router.uses_scorer), ("gate", self.router.uses_gate)):
            value, allowed = getattr(self, name), "set" if used else f"null with router {self.router.kind}"
            require((value is not None) == used, f"router.{name}", value, allowed)
        if not self.router.uses_scorer:
            # Nobody would read the state, or the logits that a temperature divides.
            unread = f"with router {self.router.kind}"
            none = isinstance(self.recurrence, NoRecurrence.Config)
            require(none, "router.recurrence", self.recurrence.kind, f"none {unread}")
            require(
                self.temperature.is_off, "router.temperature", self.temperature, f"as by default {unread}"
            )
        rate = self.balance.bias_update_rate
        takes_bias = self.gate is not None and self.gate.takes_bias
        require(rate == 0 or takes_bias, "balance.bias_update_rate", rate, "0 with a gate that takes no bias")
        gate = self.gate.kind if self.gate is not None else None
        groups = getattr(self.gate, "groups", 1)
        require(
            groups == 1 or not self.skips, "gate.groups", groups, "1 with a skip class, which is in no group"
        )
        fits = takes_bias or not self.skips
        require(fits, "router.gate", gate, "a gate that takes a bias, with a skip class")
        if self.router.has_zero_experts:
            knows = self.gate is not None and self.gate.knows_zero_experts and not self.skips
            require(
                knows,
                "router.gate",
                gate,
                "top_k, softmax or sigmoid, without a skip class, with zero experts",
            )

    @property
    def skips(self) -> bool:
        """Whether the scorer has a class, the last, that asks for no expert."""
        return self.scorer is not None and self.scorer.skip_class

    @property
    def uses_noise(self) -> bool:
        """Whether any mechanism draws routing noise in training."""
        return any(stage.uses_noise for stage in self.stages())

    @property
    def leaves_empty_slots(self) -> bool:
        """Whether a token may come with fewer than K experts."""
        dropping = self.balance.capacity_factor is not None or self.skips or self.router.has_zero_experts
        return dropping or (self.gate is not None and self.gate.leaves_empty_slots)

    @property
    def is_causal(self) -> bool:
        """Whether no token's choice depends on a later token's; a capacity limit may still drop what was chosen."""
        return self.router.is_causal and (self.gate is None or self.gate.is_causal)

    @property
    def generates(self) -> bool:
        """Whether text can be generated token by token: no token's routing needs another token."""
        return self.is_causal and not self.router.reads_sequence

    def stages(self) -> list[Options]:
        """Every mechanism in use, in the order a token meets them."""
        stages = (self.recurrence, self.scorer, self.router, self.temperature, self.gate, self.balance)
        return [stage for stage in (*stages, *self.balance.losses) if stage is not None]

    @property
    def only_k(self) -> int | None:
        """The one number of experts per token that one of its mechanisms works with; None: any."""
        return next((stage.only_k for stage in self.stages() if stage.only_k is not None), None)

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse a router that cannot work at these sizes, before anything is built.

        Raises:
            RequestError: naming the field, its value and what is allowed.
        """
        k, experts = geometry.top_k, geometry.num_experts
        require(1 <= k <= experts, "num_experts_per_tok", k, f"1 to num_experts ({experts})")
        known = geometry.vocab_size > 0 or not self.router.needs_token_ids
        require(known, "router.kind", self.router.kind, "a model that knows its token ids (vocab_size > 0)")
        for stage in self.stages():
            allowed = f"{stage.only_k} with {stage.stage} {stage.kind}"
            require(stage.only_k in (None, k), "num_experts_per_tok", k, allowed)
            chooses = isinstance(stage, Gate.Config)
            stage.check_geometry(self.router.chosen_from(geometry) if chooses else geometry)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal spec back."""
        stages = {name: getattr(self, name) for name in _STAGES}
        return {name: stage.to_dict() if stage is not None else None for name, stage in stages.items()}

    @classmethod
    def from_dict(cls, data: object) -> RouterSpec:
        """Read `to_dict`'s form, once: the same data give the same spec. A stage left out has its default.

        Raises:
            RequestError: an unknown key, or options that their mechanism refuses.
        """
        require(isinstance(data, dict), "router", data, "an object with the router's stages")
        try:
            text = json.dumps(data)
        except (TypeError, ValueError):  # no JSON: let the mechanism that it is given to refuse it
            return _parsed(data)
        return _parsed_once(text, Options.registered)


def _parsed(data: Any) -> RouterSpec:
    stages: dict[str, Any] = {}
    for name, value in data.items():
        require(name in _STAGES, f"router.{name}", value, f"one of {', '.join(_STAGES)}")
        stages[name] = None if value is None else _STAGES[name].from_dict(value)
    return RouterSpec(**stages)


@lru_cache(maxsize=256)
def _parsed_once(text: str, registered: int) -> RouterSpec:
    """`registered`: a kind that is defined anew, as in a notebook's cell, makes what was parsed before out of date."""
    return _parsed(json.loads(text))


def vary(base: RouterSpec, **stages: Options | Mapping[str, object] | None) -> RouterSpec:
    """`base` with some stages changed: a stage's options replace it, a mapping changes single options of it."""
    changed: dict[str, Any] = {}
    for stage, change in stages.items():
        old = getattr(base, stage)
        changed[stage] = dataclasses.replace(old, **change) if isinstance(change, Mapping) else change
    return dataclasses.replace(base, **changed)


def with_options(spec: RouterSpec, changes: Any) -> RouterSpec:
    """`spec` with `stage.option=value` changes, values as JSON or text.

    Raises:
        RequestError: unknown stage or option, or a value that is not allowed.
    """
    known = {
        f"{stage}.{option.name}"
        for stage in _STAGES
        if getattr(spec, stage) is not None
        for option in dataclasses.fields(getattr(spec, stage))
        if option.name != "losses"
    }
    stages: dict[str, dict[str, object]] = {}
    for change in changes:
        name, separator, text = change.partition("=")
        if not separator or name not in known:
            raise RequestError(
                "--router-option", change, f"NAME=VALUE, NAME one of {', '.join(sorted(known))}"
            )
        stage, _, option = name.partition(".")
        value = _json_value(text)
        stages.setdefault(stage, {})[option] = tuple(value) if isinstance(value, list) else value
    return vary(spec, **stages)


def _json_value(text: str) -> object:
    """`256`, `0.5`, `true`, `null` as JSON means them; anything else is the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
