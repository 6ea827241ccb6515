"""From a typed function to a command line: presets, overrides, and mistakes on one line."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
def test_tyro_boxes_become_one_line(argv, said, capsys):
    with pytest.raises(UsageError) as caught:
        parse(run, argv, prog="rmoe do")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "─" not in str(caught.value)
    assert "see rmoe do --help" in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_a_configurations_own_error_arrives_as_it_is():
    with pytest.raises(RequestError, match=r"inner.size is -1; allowed: at least 0"):
        parse(run, ["--out", "x", "--inner.size", "-1"], prog="rmoe do")
    with pytest.raises(RequestError, match=r"--preset is 'huge'; allowed: small, large"):
        parse(run, ["--out", "x", "--preset", "huge"], prog="rmoe do")
