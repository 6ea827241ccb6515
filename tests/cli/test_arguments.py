"""From a typed function to a command line: presets, overrides, and mistakes on one line."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from rmoe.cli.arguments import UsageError, parse
from rmoe.errors import RequestError


@dataclass(frozen=True)
class Inner:
    size: int = 3

    def __post_init__(self):
        if self.size < 0:
            raise RequestError("inner.size", self.size, "at least 0")


@dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    router: str = "smoe"
    preset: Annotated[str, tyro.conf.Suppress] = "small"

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        return ("small", "large")

    @classmethod
    def from_preset(cls, name: str) -> Config:
        if name not in cls.preset_names():
            raise RequestError("--preset", name, ", ".join(cls.preset_names()))
        return cls(inner=Inner(100 if name == "large" else 3), preset=name)


seen: list[object] = []


def run(*, out: str, config: Annotated[Config, tyro.conf.arg(name="")], again: bool = False) -> int:
    """Do it.

    Args:
        out: a folder.
    """
    seen[:] = [out, config, again]
    return 7


def call(*argv: str) -> object:
    bound = parse(run, argv, prog="rmoe do")
    assert bound is not None
    assert bound() == 7
    return seen[1]


def test_the_preset_is_the_default_and_options_override_it():
    assert call("--out", "x") == Config()
    assert call("--out", "x", "--preset", "large") == Config(Inner(100), preset="large")
    assert call("--router", "rmoe", "--out", "x", "--preset=large") == Config(Inner(100), "rmoe", "large")
    assert call("--preset", "large", "--out", "x", "--inner.size", "5") == replace(
        Config(Inner(5)), preset="large"
    )


def test_parsing_does_not_run():
    seen.clear()
    assert parse(run, ["--out", "x"], prog="rmoe do") is not None
    assert not seen


def test_help_lists_presets(capsys):
    assert parse(run, ["--help"], prog="rmoe do") is None
    out = capsys.readouterr().out
    assert "small, large" in out
    assert "--inner.size" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--out"),
        (["--out", "x", "--inner.sice", "5"], "--inner.sice"),
        (["--out", "x", "--inner.size", "five"], "five"),
        (["--out", "x", "stray"], "stray"),
        (["--out", "x", "--preset"], "--preset"),
    ],
)
def test_tyro_boxes_become_one_line(argv, said, capsys, monkeypatch):
    with pytest.raises(UsageError) as caught:
        parse(run, argv, prog="rmoe do")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "─" not in str(caught.value)
    assert "see rmoe do --help" in str(caught.value)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252")
    )  # tyro draws other boxes there
    with pytest.raises(UsageError) as other:
        parse(run, argv, prog="rmoe do")
    assert str(other.value) == str(caught.value)


def test_a_configurations_own_error_arrives_as_it_is():
    with pytest.raises(RequestError, match=r"inner.size is -1; allowed: at least 0"):
        parse(run, ["--out", "x", "--inner.size", "-1"], prog="rmoe do")
    with pytest.raises(RequestError, match=r"--preset is 'huge'; allowed: small, large"):
        parse(run, ["--out", "x", "--preset", "huge"], prog="rmoe do")


@dataclass(frozen=True)
class Nested:
    compile: bool = False
    path: str | None = None


@dataclass(frozen=True)
class Whole(Config):
    training: Nested = Nested()
    data: Nested = Nested()


def verb(
    model: tyro.conf.Positional[Path],
    *,
    prompt: str = "",
    out: Path | None = None,
    json: bool = False,
    count: int = 1,
    config: Annotated[Whole, tyro.conf.arg(name="")] = Whole(),
) -> None:
    """Do it."""


def given(*argv: str) -> dict[str, object]:
    bound = parse(verb, argv, prog="rmoe do")
    assert isinstance(bound, partial)
    return bound.keywords


@pytest.mark.parametrize(
    "argv",
    [
        ("m", "--data", "a=b,c", "--prompt", "p", "--json", "--count", "2", "--training.compile"),
        ("--data=a=b,c", "--prompt=p", "--json", "--count=2", "--training.compile", "m"),
        ("--json=true", "--data=a=b,c", "m", "--count=2", "--training.compile=True", "--prompt=p"),
        ("--count=2", "m", "--data.path=a=b,c", "--prompt=p", "--json=TRUE", "--training.compile"),
    ],
)
def test_name_and_value_in_every_position(argv: tuple[str, ...]) -> None:
    keywords = given(*argv)
    whole = keywords["config"]
    assert (keywords["model"], keywords["prompt"], keywords["json"], keywords["count"]) == (
        Path("m"),
        "p",
        True,
        2,
    )
    assert isinstance(whole, Whole)
    assert (whole.data.path, whole.training.compile) == ("a=b,c", True)


def test_a_flag_that_is_said_to_be_false() -> None:
    keywords = given("m", "--json=false", "--training.compile=False")
    assert keywords["json"] is False
    assert keywords["config"] == Whole()


def test_a_value_may_look_like_an_option() -> None:
    assert given("m", "--prompt=--data")["prompt"] == "--data"
    assert given("m", "--prompt=--json=true")["prompt"] == "--json=true"
    assert given("m", "--prompt", "a --json=true")["prompt"] == "a --json=true"


def test_a_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    keywords = given("~/m", "--out=~/o", "--prompt=~/p")
    assert (keywords["model"], keywords["out"]) == (Path("/home/somebody/m"), Path("/home/somebody/o"))
    assert keywords["prompt"] == "~/p"
    with pytest.raises(RequestError, match="--out is '~nobody-here/x'"):
        parse(verb, ["m", "--out=~nobody-here/x"], prog="rmoe do")()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["m", "--out", ""], "--out"),
        (["m", "--out="], "--out"),
        (["", "--out", "o"], "MODEL"),
        (["--json", ""], "MODEL"),
        (["--prompt", "p", ""], "MODEL"),
    ],
)
def test_an_empty_path_is_refused(argv: list[str], field: str) -> None:
    with pytest.raises(RequestError, match=f"^{field} is ''; allowed: a path$"):
        parse(verb, argv, prog="rmoe do")
    assert given("m", "--prompt", "", "--out", "o")["prompt"] == ""
    assert given("m", "--prompt=", "--out=.")["out"] == Path()
