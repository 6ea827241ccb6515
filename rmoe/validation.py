"""One validator: msgspec's types and bounds, and the one place that turns what it refuses into a `RequestError`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from rmoe.errors import RequestError

C = TypeVar("C")

# Of what a tensor holds: float32's normal numbers, int64's.
_LEAST, _MOST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
_MOST_INT = 2**63 - 1

# A bound's description is what its error says is allowed.
Finite = Annotated[float, Meta(ge=-_MOST, le=_MOST, description="a finite number, in float32")]
Positive = Annotated[float, Meta(ge=_LEAST, le=_MOST, description="a value above 0, finite in float32")]
PositiveInt = Annotated[int, Meta(gt=0, le=_MOST_INT, description="a value above 0")]
NotNegative = Annotated[float, Meta(ge=0, le=_MOST, description="0 or more, finite in float32")]
NotNegativeInt = Annotated[int, Meta(ge=0, le=_MOST_INT, description="0 or more")]
AtLeastOne = Annotated[int, Meta(ge=1, le=_MOST_INT, description="1 or more")]
Share = Annotated[float, Meta(ge=0, lt=1, description="0 to below 1")]


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise the `RequestError` for `name` unless `ok`."""
    if not ok:
        raise RequestError(name, value, allowed)


def check(name: str, value: object, annotation: Any) -> None:
    """Require a value to be of a type and within its bounds. An int fits a float; a bool fits neither.

    >>> check("gate.k", 2, PositiveInt | None)
    >>> check("gate.k", 0, PositiveInt | None)
    Traceback (most recent call last):
    rmoe.errors.RequestError: gate.k is 0; allowed: a value above 0, or null

    Raises:
        RequestError: naming the field, the value and what is allowed.
    """
    if not _fits(value, annotation):
        bare = _without_bounds(annotation)
        raise RequestError(name, value, _bounds(annotation) if _fits(value, bare) else _phrase(bare))


def check_fields(owner: Any, section: str) -> None:
    """`check` every field of a dataclass, named `section.field`.

    Raises:
        RequestError: see `check`.
    """
    hints = typing.get_type_hints(type(owner), include_extras=True)
    for field in dataclasses.fields(owner):
        check(f"{section}.{field.name}", getattr(owner, field.name), hints[field.name])


class Text(str):
    """A value given as text, to be read as whatever type its field has; "None" is null where that is allowed."""


def build(cls: type[C], data: object, prefix: str = "") -> C:
    """A configuration dataclass from nested tables: every name and type is checked on the way.

    Args:
        data: name -> value; values may be `Text`. What is left out has its default.
        prefix: the table's own dotted name, for messages.

    Raises:
        RequestError: an unknown name, or a value of the wrong type; naming the field and what is allowed.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    require(isinstance(data, dict), prefix or "configuration", data, "a table")
    values = {}
    for key, value in typing.cast("dict[str, object]", data).items():
        name = f"{prefix}.{key}" if prefix else key
        require(key in known, name, value, f"one of {', '.join(sorted(known))}")
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = build(hints[key], value, name) if nested else _read(name, value, hints[key])
    return cls(**values)


def _read(name: str, value: object, hint: Any) -> Any:
    try:
        if isinstance(value, Text):
            text = None if value == "None" and type(None) in _options(hint) else str(value)
            return msgspec.convert(text, hint, strict=False)
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise RequestError(name, value, _phrase(hint)) from None


def _fits(value: object, annotation: Any) -> bool:
    if typing.get_origin(annotation) is tuple:  # of instances, which msgspec would build and not take
        return isinstance(value, tuple) and all(isinstance(v, typing.get_args(annotation)[0]) for v in value)
    try:
        msgspec.convert(value, annotation, strict=True)
    except msgspec.ValidationError:
        return False
    return True


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; a type that is none is its only one."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _without_bounds(annotation: Any) -> Any:
    bare = [typing.get_args(o)[0] if typing.get_origin(o) is Annotated else o for o in _options(annotation)]
    return typing.Union[tuple(bare)]  # noqa: UP007 (made at run time)


def _bounds(annotation: Any) -> str:
    metas = (m for o in _options(annotation) if typing.get_origin(o) is Annotated for m in o.__metadata__)
    phrase = " or ".join(str(m.description) for m in metas)
    return phrase + (", or null" if type(None) in _options(annotation) else "")


def _phrase(annotation: Any) -> str:
    parts = []
    for option in _options(annotation):
        if typing.get_origin(option) is Literal:
            parts += [repr(choice) for choice in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            parts.append(f"a list of {_phrase(typing.get_args(option)[0])}")
        else:
            parts.append("null" if option is type(None) else getattr(option, "__name__", str(option)))
    return " or ".join(parts)
