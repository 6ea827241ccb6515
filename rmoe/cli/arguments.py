"""From a verb's typed function to its command line, with every mistake said in one line.

`tyro` reads the signature and draws the help. Its errors are boxes of several lines; here they become one
`RequestError`, because the exit contract of `rmoe` is one line and status 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from rmoe.errors import RequestError
from rmoe.places import expand

Verb = Callable[..., int | None]

# Short names for nested settings, by the parameter of the verb that has them.
_ALIASES = {
    "config": {"--data": "--data.path", "--seed": "--training.seed"},
    "engine": {"--engine": "--engine.kind", "--runs-per-gpu": "--engine.runs-per-gpu"},
}

NARROWEST = 20  # columns: in fewer than 6 tyro wraps a help text without end
_BOX_EDGES = "╭╮╰╯│─ "


class UsageError(RequestError):
    """A command line that does not parse; the text is tyro's, on one line."""

    def __init__(self, prog: str, said: str) -> None:
        super().__init__("command line", said, f"see {prog} --help")
        self.args = (f"{said} (see {prog} --help)",)


def names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated option.

    >>> names("smoe, rmoe,")
    ('smoe', 'rmoe')
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


GIVEN: ContextVar[frozenset[str]] = ContextVar("GIVEN", default=frozenset())
"""Options of the command line that was parsed last, in full: `--training.micro-batch-size`."""


def require_unset(
    reader: Callable[..., Any], given: Mapping[str, Any], options: Iterable[str], where: str
) -> None:
    """Refuse options that nothing reads in this call.

    Args:
        reader: the verb, or the dataclass of its options; an option is unset if it has its default there.
        given: what was given, by parameter.
        options: those parameters that are not read.
        where: `without --tasks`.

    Raises:
        RequestError: one of them is set.
    """
    for name in options:
        value = given[name]
        if value != inspect.signature(reader).parameters[name].default:
            option = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise RequestError(option, True if value is False else value, f"unset {where}")


def parse(run: Verb, argv: Sequence[str], prog: str) -> Callable[[], int | None] | None:
    """Bind `run` to a command line without calling it.

    Args:
        run: a typed function; its parameters become options, its docstring the help text. A parameter
            `config` whose type has `from_preset(name)` and `preset_names()` adds the option `--preset NAME`.
        argv: the arguments after the verb.
        prog: the command as its user types it, `rmoe train`.

    Returns:
        `run` with all arguments bound, or None when `--help` was asked for and printed.

    Raises:
        RequestError: the command line is wrong: a configuration's own validation, or a `UsageError`.
    """
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    argv = _plain(argv, run)
    parameters = _parameters(run, argv)
    options = {token.partition("=")[0].replace("_", "-") for token in argv if token.startswith("--")}
    GIVEN.set(frozenset(options))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            bound = tyro.cli(_binder(run, parameters), args=list(argv), prog=prog)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise _as_request_error(stop, errors.getvalue(), prog) from None
    data = getattr(bound.keywords.get("config"), "data", None)
    settings: dict[str, Any] = {"engine": bound.keywords.get("engine"), "data": data}
    for section, values in settings.items():
        if hasattr(values, "require_read"):
            fields = {option.removeprefix(f"--{section}.") for option in options}
            values.require_read(sorted(field.replace("-", "_") for field in fields))
    return bound


def _parameters(run: Verb, argv: Sequence[str]) -> list[inspect.Parameter]:
    """`run`'s parameters with resolved annotations; with a preset, `config` gets it as its default.

    The preset's name has to be known before parsing, since the preset is what the other options override.
    """
    hints = get_type_hints(run, include_extras=True)
    parameters = {
        name: parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(run).parameters.items()
    }
    config_type: Any = hints.get("config")
    if get_origin(config_type) is Annotated:
        config_type = get_args(config_type)[0]
    if hasattr(config_type, "from_preset"):
        allowed = ", ".join(config_type.preset_names())
        option = Annotated[str, tyro.conf.arg(help=f"Configuration the other options override: {allowed}.")]
        default = config_type.preset
        parameters = {
            "preset": inspect.Parameter(
                "preset", inspect.Parameter.KEYWORD_ONLY, annotation=option, default=default
            )
        } | parameters
        parameters["config"] = parameters["config"].replace(default=_defaults(config_type, argv, default))
        if "engine" in parameters:  # the `[engine]` table of a preset of the user's own
            preset = _value(argv, "--preset") or default
            engine = hints["engine"].from_preset(preset)
            parameters["engine"] = parameters["engine"].replace(default=engine)
    return list(parameters.values())


def _defaults(config_type: Any, argv: Sequence[str], preset: str) -> Any:
    """What the options override: the preset asked for; with `--resume` alone the run that is there."""
    asked, out = _value(argv, "--preset"), _value(argv, "--out")
    if asked is None and out is not None and "--resume" in argv:
        running = config_type.from_run(expand(out, "--out"))
        if running is not None:
            return running
    return config_type.from_preset(asked or preset)


def _plain(argv: Sequence[str], run: Verb) -> list[str]:
    """A command line in the one form that is parsed: aliases in full, `--flag=true` as `--flag`.

    What follows an option that takes a value is that value, whatever it looks like, and stays.

    Raises:
        RequestError: an empty path: tyro makes the current folder of it.
    """
    hints = get_type_hints(run, include_extras=True)
    flags, paths = _options(hints, bool), _options(hints, Path, Path | None)
    positional = next((name for name, hint in hints.items() if tyro.conf.Positional in get_args(hint)), "")
    parameters = inspect.signature(run).parameters
    aliases = {
        short: whole for name in _ALIASES if name in parameters for short, whole in _ALIASES[name].items()
    }
    plain: list[str] = []
    is_value, name = False, ""
    for token in argv:
        if is_value or not token.startswith("--"):
            if not token and (name if is_value else f"--{positional}") in paths:
                raise RequestError(name if is_value else positional.upper(), "", "a path")
            plain.append(token)
            is_value = False
            continue
        option, separator, value = token.partition("=")
        name = option.replace("_", "-")
        if separator and not value and name in paths:
            raise RequestError(name, "", "a path")
        if name in flags:
            said = value.lower()
            if separator and said in ("true", "false"):
                before, dot, last = name.removeprefix("--").rpartition(".")
                token = name if said == "true" else f"--{before}{dot}no-{last}"
        else:
            token = aliases.get(option, option) + separator + value
            is_value = not separator and name.replace("no-", "") not in flags and option != "--help"
        plain.append(token)
    return plain


def _options(hints: dict[str, Any], *kinds: Any, prefix: str = "--") -> set[str]:
    """The options of a function, or of a configuration in it, that are of one of these types; flags are bool."""
    found: set[str] = set()
    for name, hint in hints.items():
        kind, unnamed = hint, False
        if get_origin(hint) is Annotated:
            kind, *notes = get_args(hint)
            unnamed = any(getattr(note, "name", None) == "" for note in notes)
        option = prefix + name.replace("_", "-")
        if kind in kinds:
            found.add(option)
        elif dataclasses.is_dataclass(kind):
            inner = get_type_hints(kind, include_extras=True)
            found |= _options(inner, *kinds, prefix=prefix if unnamed else f"{option}.")
    return found


def _value(argv: Sequence[str], option: str) -> str | None:
    """The value an option is given last, None without it."""
    value = None
    for token, following in pairwise([*argv, None]):
        if token == option:
            value = following
        elif token and token.startswith(f"{option}="):
            value = token.removeprefix(f"{option}=")
    return value


def _binder(run: Verb, parameters: list[inspect.Parameter]) -> Callable[..., partial[int | None]]:
    """A function with these parameters that returns `run` bound instead of calling it.

    tyro calls what it parses for; `run` must be called outside, where its output and its errors are its own.
    """
    accepted = inspect.signature(run).parameters

    def bind(**arguments: Any) -> partial[int | None]:
        given = {name: value for name, value in arguments.items() if name in accepted}
        for name, value in given.items():
            if isinstance(value, Path):  # a shell leaves the ~ of `--out=~/runs` alone
                given[name] = expand(value, "MODEL" if name == "model" else f"--{name.replace('_', '-')}")
        return partial(run, **given)

    bind.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    bind.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    bind.__doc__ = run.__doc__
    return bind


def _as_request_error(stop: SystemExit, box: str, prog: str) -> RequestError:
    """The configuration's own `RequestError` if that is what stopped tyro, else tyro's box on one line."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, RequestError):
            return cause
        cause = cause.__context__
    # The title, and the error up to a rule; where the terminal is not UTF-8, rules are of "-" and one is above it too.
    rows = [row.strip(_BOX_EDGES) for row in box.splitlines()[1:]]
    parts = groupby(rows, lambda row: bool(row.strip("-")))
    said: list[str] = next((list(part) for is_text, part in parts if is_text), [])
    return UsageError(prog, " ".join(" ".join(said).split()))
