"""The experiments run from the checkout, and what their plugin registers is gone after each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from rmoe.routing.zoo import ZOO
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def zoo_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The experiments' plugin registers routers; other tests in this process look at the whole zoo."""
    monkeypatch.chdir(ROOT)
    before = dict(ZOO)
    yield
    ZOO.clear()
    ZOO.update(before)
    for name in [name for name in sys.modules if name.startswith("rmoe_plugin_")]:
        del sys.modules[name]  # the next test's plugin registers itself anew
