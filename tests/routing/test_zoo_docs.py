"""The zoo's table in docs is what the code says, and a router from outside the package obeys the contract."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rmoe.cli.main import main
from rmoe.errors import RequestError
from rmoe.routing import ZOO, ZooRow, register, resolve

ROOT = Path(__file__).parents[2]


def test_table_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """`rmoe zoo --markdown > docs/zoo.md` mends it."""
    assert main(["zoo", "--markdown"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "`distance" not in line]
    assert printed == (ROOT / "docs" / "zoo.md").read_text().splitlines()


def test_json_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows.keys() == ZOO.keys()
    assert {"summary", "source", "stages", "equation", "balance", "carries", "needs", "spec"} <= rows[
        "rmoe"
    ].keys()


@pytest.fixture
def plugin() -> None:
    path = ROOT / "examples" / "distance_router.py"
    spec = importlib.util.spec_from_file_location("distance_router", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["distance_router"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)


@pytest.mark.usefixtures("plugin")
def test_outside_router_trains(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.model.small import model, tokens

    for name in ("distance", "distance-rmoe"):
        net = model(router=name)
        net(tokens(), labels=tokens()).loss.backward()
        centres = net.routers[0].scorer.centres
        assert (centres.grad != 0).any()
        assert torch.isfinite(centres.grad).all()
    for name in ("distance", "distance-rmoe"):
        del ZOO[name]


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(RequestError, match="router is 'smoe'; allowed: a name that is not taken"):
        register("smoe", ZooRow(resolve("rmoe"), "x", "y"))
