"""The diagram of the contributing guide is what import-linter checks, and the exceptions only get fewer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "pyproject.toml"
CONTRACTS: dict[str, Any] = {
    contract["id"]: contract
    for contract in tomllib.loads(PROJECT.read_text())["tool"]["importlinter"]["contracts"]
}


def test_the_guides_diagram_is_the_contract() -> None:
    (diagram,) = re.findall(
        r"^```text\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert diagram.splitlines() == CONTRACTS["layers"]["layers"]


def test_every_package_and_module_has_its_line() -> None:
    named = {name for line in CONTRACTS["layers"]["layers"] for name in line.split(" | ")}
    children = {
        path.stem
        for path in (ROOT / "rmoe").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert named == children - {"__init__"}


def test_exceptions_only_get_fewer() -> None:
    assert "ignore_imports" not in CONTRACTS["layers"]
    assert "ignore_imports" not in CONTRACTS["pure"]
    assert len(CONTRACTS["quick"]["ignore_imports"]) <= 1


def test_the_contracts_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout
