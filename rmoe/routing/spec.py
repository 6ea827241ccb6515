"""What a router is, as data: frozen, strictly validated, round-tripping through JSON. Imports no torch.

A `RouterSpec` names one mechanism per stage. A mechanism is a subclass of the stage's spec class below: its
fields are its options, `kind` is its name in JSON, and `build` makes the `torch.nn.Module` that carries it
out. Defining the subclass registers it, also outside this package (see `docs/add-a-router.md`).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from rmoe.errors import RequestError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Geometry:
    """The sizes a router is built for.

    Attributes:
        hidden_size: `d`, width of the hidden states the router reads.
        num_experts: `E`, routed experts of one layer.
        top_k: `k`, experts each token is sent to.
        num_layers: `L`, layers that route (dense layers do not count).
        layer_index: which of those layers this is, from 0.
        vocab_size: distinct token ids, for routers that read them.
        initializer_range: standard deviation of the model's own normal initialisation.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    num_layers: int = 1
    layer_index: int = 0
    vocab_size: int = 0
    initializer_range: float = 0.02


def _matches(value: object, annotation: Any) -> bool:
    """Whether a value, as it comes from JSON, fits an annotation. An int fits a float; a bool fits neither."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(annotation))
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, typing.get_args(annotation)[0]) for v in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _phrase(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_phrase(option) for option in typing.get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise the `RequestError` for `name` unless `ok`."""
    if not ok:
        raise RequestError(name, value, allowed)


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """Options of one mechanism of one stage. Subclass the stage's class, not this one.

    Raises:
        RequestError: on construction, when a field has the wrong type or `check` refuses its value.
    """

    stage: ClassVar[str] = "stage"
    kind: ClassVar[str] = ""
    implementation: ClassVar[str] = ""  # "module:Class", imported only when a router is built
    equation: ClassVar[str] = ""  # as the zoo's table prints it; x input, f features, s scores, g weights
    mechanisms: ClassVar[dict[str, type[StageSpec]]] = {}

    @property
    def uses_noise(self) -> bool:
        """Whether it draws routing noise in training."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stage" in cls.__dict__:  # a stage's base class: it gets a table of its own
            cls.mechanisms = {}
        if "kind" in cls.__dict__:
            known = cls.mechanisms.get(cls.kind)
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise RequestError(f"{cls.stage}.kind", cls.kind, f"a name not taken by {known.__module__}")
            cls.mechanisms[cls.kind] = cls

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            require(
                _matches(value, hints[item.name]), self.name_of(item.name), value, _phrase(hints[item.name])
            )
        self.check()

    def name_of(self, option: str) -> str:
        """How an option is named in errors: `gate.temperature`."""
        return f"{self.stage}.{option}"

    def positive(self, *options: str) -> None:
        """Require each named option to be above zero (or None, where its type allows)."""
        for option in options:
            value = getattr(self, option)
            require(value is None or value > 0, self.name_of(option), value, "a value above 0")

    def check(self) -> None:
        """Refuse option values that can never work."""

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse option values that cannot work in a model of this geometry."""

    def load_implementation(self) -> Any:
        """The class or function that carries this mechanism out, imported now."""
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """The mechanism that a JSON object names.

        Raises:
            RequestError: unknown kind, unknown option, or an option of the wrong type or value.
        """
        require(isinstance(data, dict), cls.stage, data, "an object with a 'kind'")
        options = dict(typing.cast(dict, data))
        kind = options.pop("kind", None)
        require(kind in cls.mechanisms, f"{cls.stage}.kind", kind, ", ".join(sorted(cls.mechanisms)))
        mechanism = cls.mechanisms[typing.cast(str, kind)]
        known = {f.name for f in dataclasses.fields(mechanism)}
        for option, value in options.items():
            require(option in known, f"{cls.stage}.{option}", value, f"options of {kind}: {sorted(known)}")
            options[option] = tuple(value) if isinstance(value, list) else value
        return typing.cast(Self, mechanism(**options))


class RecurrenceSpec(StageSpec):
    """Stage 1, Eq. 4 and 5: `[T, d]` and the state of the layer below -> features and the new state."""

    stage = "recurrence"

    def features(self, geometry: Geometry) -> int:
        """Width of the features it gives the scorer."""
        raise NotImplementedError

    def build(self, geometry: Geometry) -> nn.Module:
        """One layer's module: `(hidden [T, d], state, shared) -> (features [T, f], state)`."""
        return self.load_implementation()(self, geometry)


class ScorerSpec(StageSpec):
    """Stage 2, Eq. 6: features -> raw logits `[T, C]`."""

    stage = "scorer"

    def build(self, geometry: Geometry, features: int) -> nn.Module:
        """One layer's module: `(features [T, features], shared, noise) -> logits [T, C]`."""
        return self.load_implementation()(self, geometry, features)


class GateSpec(StageSpec):
    """Stage 3, Eq. 1: logits -> weights and experts `[T, K]`."""

    stage = "gate"
    takes_bias: ClassVar[bool] = False
    is_causal: ClassVar[bool] = True
    leaves_empty_slots: ClassVar[bool] = True  # False lets the experts' kernels skip the check for them

    def build(self, geometry: Geometry) -> nn.Module:
        """One layer's module: `(logits [T, C], bias, context) -> Routing`."""
        return self.load_implementation()(self, geometry)


class RouterKind(StageSpec):
    """How the stages are put together; a mechanism that does not fit three stages is a kind of its own."""

    stage = "router"
    uses_scorer: ClassVar[bool] = True
    uses_gate: ClassVar[bool] = True
    needs_token_ids: ClassVar[bool] = False

    def build(self, spec: RouterSpec, geometry: Geometry) -> nn.Module:
        """One layer's router, a `rmoe.routing.router.BaseRouter`."""
        return self.load_implementation()(self, spec, geometry)


@dataclass(frozen=True, kw_only=True)
class LossSpec(StageSpec):
    """One balance loss, a pure function of the layers' `Routing`, averaged over layers.

    `weight` multiplies it in the training loss; None stands for the model's `router_aux_loss_coef`.
    """

    stage = "loss"

    weight: float | None = None

    def check(self) -> None:
        ok = self.weight is None or self.weight >= 0
        require(ok, f"loss.{self.kind}.weight", self.weight, "0 or more, or null")


@dataclass(frozen=True, kw_only=True)
class BalanceSpec(StageSpec):
    """How experts are kept equally busy: losses, a bias on the selection, and what happens beyond capacity.

    Attributes:
        losses: added to the language-model loss.
        scope: whose tokens the assignment shares of the losses count: this micro-batch's, or those of all
            ranks and of the earlier micro-batches of this optimizer step (arXiv:2501.11873).
        bias_update_rate: step of the aux-loss-free bias on the selection scores (arXiv:2408.15664); 0 is off.
        bias_centred: subtract the mean from each bias update, as torchtitan does.
        capacity_factor: each expert takes at most `ceil(factor * T * k / E)` tokens of a batch, in token
            order, the rest is dropped; None is dropless.
    """

    stage = "balance"
    kind = "balance"

    losses: tuple[LossSpec, ...] = ()
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    bias_update_rate: float = 0.0
    bias_centred: bool = False
    capacity_factor: float | None = None

    def check(self) -> None:
        require(self.bias_update_rate >= 0, "balance.bias_update_rate", self.bias_update_rate, "0 or more")
        self.positive("capacity_factor")
        kinds = [loss.kind for loss in self.losses]
        require(len(kinds) == len(set(kinds)), "balance.losses", kinds, "each kind at most once")

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"losses": [loss.to_dict() for loss in self.losses]}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        if isinstance(data, dict) and isinstance(data.get("losses"), list | tuple):
            losses = [LossSpec.from_dict(loss) for loss in data["losses"]]
            data = {**data, "losses": losses}
        return super().from_dict(data)


@dataclass(frozen=True, kw_only=True)
class TemperatureSpec(StageSpec):
    """What the logits are divided by before the gate.

    Held at `start`; or moved geometrically from `start` to `end` over training; or, with `target_entropy`
    (in nats), steered after each optimizer step so that the layer's mean gate entropy approaches the target:
    `ln T += rate * (target - entropy)`.
    """

    stage = "temperature"
    kind = "temperature"

    start: float = 1.0
    end: float | None = None
    target_entropy: float | None = None
    rate: float = 0.05

    def check(self) -> None:
        self.positive("start", "end", "target_entropy", "rate")
        both = self.end is not None and self.target_entropy is not None
        require(not both, "temperature.end", self.end, "null when temperature.target_entropy is set")

    def check_geometry(self, geometry: Geometry) -> None:
        import math

        limit = math.log(geometry.num_experts)
        target = self.target_entropy
        allowed = f"below ln(num_experts) = {limit:.4f} nats"
        require(target is None or target < limit, "temperature.target_entropy", target, allowed)

    @property
    def is_off(self) -> bool:
        return self.start == 1.0 and self.end is None and self.target_entropy is None


def _default(kind: type[StageSpec], name: str) -> Any:
    """The default mechanism of a stage, looked up when it is needed: mechanisms.py imports this file."""

    def make() -> StageSpec:
        import_module("rmoe.routing.mechanisms")
        return kind.mechanisms[name]()

    return field(default_factory=make)


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """One router: a mechanism per stage. Two specs are the same router exactly when they are equal.

    >>> from rmoe.routing.zoo import resolve
    >>> spec = resolve("rmoe")
    >>> spec.recurrence.width, spec.scorer.kind, spec.gate.kind
    (128, 'linear', 'softmax')
    >>> RouterSpec.from_json(spec.to_json()) == spec
    True

    Raises:
        RequestError: a stage is missing, superfluous, or of the wrong type.
    """

    router: RouterKind = _default(RouterKind, "staged")  # noqa: RUF009
    recurrence: RecurrenceSpec = _default(RecurrenceSpec, "none")  # noqa: RUF009
    scorer: ScorerSpec | None = _default(ScorerSpec, "linear")  # noqa: RUF009
    gate: GateSpec | None = _default(GateSpec, "softmax")  # noqa: RUF009
    temperature: TemperatureSpec = field(default_factory=TemperatureSpec)
    balance: BalanceSpec = field(default_factory=BalanceSpec)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            require(
                _matches(value, hints[item.name]), f"router.{item.name}", value, _phrase(hints[item.name])
            )
        for stage, used in (("scorer", self.router.uses_scorer), ("gate", self.router.uses_gate)):
            value, allowed = getattr(self, stage), "set" if used else f"null with router {self.router.kind}"
            require((value is not None) == used, f"router.{stage}", value, allowed)
        rate = self.balance.bias_update_rate
        takes_bias = self.gate is not None and self.gate.takes_bias
        require(rate == 0 or takes_bias, "balance.bias_update_rate", rate, "0 with a gate that takes no bias")
        skips = bool(getattr(self.scorer, "skip_class", False))
        gate = self.gate.kind if self.gate is not None else None
        require(not skips or takes_bias, "router.gate", gate, "a gate that takes a bias, with a skip class")

    @property
    def uses_noise(self) -> bool:
        """Whether any mechanism draws routing noise in training."""
        return any(stage.uses_noise for stage in self.stages())

    @property
    def leaves_empty_slots(self) -> bool:
        """Whether a token may come with fewer than K experts."""
        dropping = self.balance.capacity_factor is not None or bool(getattr(self.scorer, "skip_class", False))
        return dropping or (self.gate is not None and self.gate.leaves_empty_slots)

    @property
    def is_causal(self) -> bool:
        """Whether no token's routing depends on a later token's."""
        return self.gate is None or self.gate.is_causal

    def stages(self) -> list[StageSpec]:
        """Every mechanism in use, in the order a token meets them."""
        stages = (self.recurrence, self.scorer, self.temperature, self.gate, self.router, self.balance)
        return [stage for stage in (*stages, *self.balance.losses) if stage is not None]

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse a router that cannot work at these sizes, before anything is built.

        Raises:
            RequestError: naming the field, its value and what is allowed.
        """
        k, experts = geometry.top_k, geometry.num_experts
        require(1 <= k <= experts, "num_experts_per_tok", k, f"1 to num_experts ({experts})")
        for stage in self.stages():
            stage.check_geometry(geometry)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives an equal spec back."""
        stages = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: stage.to_dict() if stage is not None else None for name, stage in stages.items()}

    @classmethod
    def from_dict(cls, data: object) -> RouterSpec:
        """Read `to_dict`'s form. A stage left out has its default; an unknown key is refused."""
        import_module("rmoe.routing.mechanisms")  # so that their kinds are known
        require(isinstance(data, dict), "router", data, "an object with the router's stages")
        classes: dict[str, type[StageSpec]] = {
            "router": RouterKind,
            "recurrence": RecurrenceSpec,
            "scorer": ScorerSpec,
            "gate": GateSpec,
            "temperature": TemperatureSpec,
            "balance": BalanceSpec,
        }
        stages: dict[str, Any] = {}
        for name, value in typing.cast(dict, data).items():
            require(name in classes, f"router.{name}", value, f"one of {', '.join(classes)}")
            stages[name] = None if value is None else classes[name].from_dict(value)
        return cls(**stages)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RouterSpec:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError("router", text[:60], f"a JSON object ({error})") from None
        return cls.from_dict(data)
