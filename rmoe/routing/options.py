"""Options of mechanisms, as data: frozen, validated, registered by `kind`, round-tripping through JSON.

A mechanism is one class: a module with its equation, its initialisation, and its options, the `Config` nested in it:

    class MyGate(Gate):
        class Config(Gate.Config):
            kind = "my_gate"
            sharpness: Positive = 1.0

Defining it registers the kind, makes the `Config` a frozen keyword-only dataclass, and lets `Config.build` make the
module. `docs/add-a-router.md` does it outside this package.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from rmoe.errors import RequestError
from rmoe.validation import check, require


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


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one mechanism of one stage. A subclass's annotated attributes are its options.

    Raises:
        RequestError: on construction, when an option has the wrong type or value.
    """

    stage: ClassVar[str] = "stage"
    kind: ClassVar[str] = ""
    mechanisms: ClassVar[dict[str, type[Options]]] = {}
    mechanism: ClassVar[Any]  # the class that this is the `Config` of
    registered: ClassVar[int] = (
        0  # how many times a kind was registered: specs parsed before may be out of date
    )

    # What a mechanism says of itself: a property, or a plain attribute where it does not depend on the options.

    @property
    def equation(self) -> str:
        """As the zoo prints it: x input, f features, s scores, g weights."""
        return ""

    @property
    def carries(self) -> str:
        """What it hands from layer to layer, with its width per token."""
        return ""

    @property
    def uses_noise(self) -> bool:
        """Whether it draws routing noise in training."""
        return False

    @property
    def moves(self) -> bool:
        """Whether it has state that moves after each optimizer step."""
        return False

    @property
    def only_k(self) -> int | None:
        """The one number of experts per token that it works with; None: any."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)
        if "stage" in cls.__dict__:  # a stage's base class: it gets a table of its own
            cls.mechanisms = {}
        if "kind" in cls.__dict__:
            known = cls.mechanisms.get(cls.kind, cls)
            same = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
            require(same, f"{cls.stage}.kind", cls.kind, f"a name not taken by {known.__module__}")
            cls.mechanisms[cls.kind] = cls
            Options.registered += 1

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for option in dataclasses.fields(self):
            check(self.name_of(option.name), getattr(self, option.name), hints[option.name])
        self.check()

    def name_of(self, option: str) -> str:
        """How an option is named in errors: `gate.temperature`."""
        return f"{self.stage}.{option}"

    def check(self) -> None:
        """Refuse options that can never work together."""

    def check_geometry(self, geometry: Geometry) -> None:
        """Refuse options that cannot work in a model of this geometry."""

    def build(self, *sizes: Any) -> Any:
        """One layer's module; each stage's base class says what the sizes are and what the module computes."""
        return self.mechanism(self, *sizes)

    def changed(self, *shown: str) -> list[str]:
        """`name=value` of the options that differ from their default, but for those that `shown` names."""
        default = type(self)()
        names = [option.name for option in dataclasses.fields(self) if option.name not in shown]
        return [f"{n}={value}" for n in names if (value := getattr(self, n)) != getattr(default, n)]

    def described(self) -> str:
        """The kind and the options that differ from their default: `linear(bias=True)`."""
        options = self.changed()
        return f"{self.kind}({', '.join(options)})" if options else self.kind

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
        if not isinstance(kind, str) or kind not in cls.mechanisms:
            raise RequestError(f"{cls.stage}.kind", kind, ", ".join(sorted(cls.mechanisms)))
        mechanism = cls.mechanisms[kind]
        known = {f.name for f in dataclasses.fields(mechanism)}
        for option, value in options.items():
            require(option in known, f"{cls.stage}.{option}", value, f"options of {kind}: {sorted(known)}")
            options[option] = tuple(value) if isinstance(value, list) else value
        return typing.cast(Self, mechanism(**options))


class Mechanism:
    """Mixin of everything that is built from options: its nested `Config` builds it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Config" in cls.__dict__:
            cls.__dict__["Config"].mechanism = cls
