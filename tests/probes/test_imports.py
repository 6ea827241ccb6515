"""Probes need routing, and the plugins that register routers, alone; reading their results needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import rmoe.probes

MAY = ("rmoe.probes", "rmoe.routing", "rmoe.plugins", "rmoe.errors", "rmoe.records", "rmoe.results")


def test_probes_import_routing_alone() -> None:
    for file in Path(rmoe.probes.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("rmoe.") or name.startswith(MAY), f"{file.name} imports {name}"


def test_results_and_reports_need_no_torch() -> None:
    modules = "rmoe.probes, rmoe.report.probes.page, rmoe.report.probes.cards"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
