"""Which tests can see a fault in which file: the fastest first, since the first failure ends a mutant's run."""

from __future__ import annotations

# How many mutants of each part the fixed sample has.
PARTS = {
    "rmoe/routing": 150,
    "rmoe/model": 100,
    "rmoe/analysis": 80,
    "rmoe/compare/statistics.py": 35,
    "rmoe/training/checkpoint.py": 35,
}
# A table whose every line a golden file repeats: its mutants would only flatter the rate.
LEFT_OUT = ("rmoe/routing/zoo.py",)

_ROUTING = ("tests/routing/test_mechanisms.py", "tests/routing", "tests/contract/test_contract.py")
_MODEL = ("tests/model",)
_MEASURES = ("tests/analysis/test_measures.py",)

# The longest entry that a file's path begins with counts; each entry's tests are named in full.
TESTS: dict[str, tuple[str, ...]] = {
    "rmoe/routing/": _ROUTING,
    "rmoe/model/": _MODEL,
    "rmoe/analysis/": ("tests/analysis",),
    "rmoe/compare/statistics.py": ("tests/compare/test_statistics.py", "rmoe/compare/statistics.py"),
    "rmoe/training/checkpoint.py": ("tests/training/test_checkpoint.py",),
}


def tests_of(file: str) -> tuple[str, ...]:
    """Arguments for pytest."""
    return TESTS[max((entry for entry in TESTS if file.startswith(entry)), key=len)]
