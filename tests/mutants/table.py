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

# Not test_global_batch.py: its processes are started afresh and know nothing of the mutant.
_ROUTING = (
    "tests/routing/test_mechanisms.py",
    "tests/routing/test_training_state.py",
    "tests/routing/test_reference.py",
    "tests/routing/test_peers.py",
    "tests/contract/test_contract.py::test_equals_the_naive_reference",
    "tests/contract/test_contract.py::test_gradients_reach_what_they_should",
    "tests/contract/test_contract.py::test_shapes_and_dtypes",
    "tests/contract/test_contract.py::test_golden",
)

# The longest entry that a file's path begins with counts.
TESTS: dict[str, tuple[str, ...]] = {
    "rmoe/routing/": _ROUTING,
    "rmoe/routing/recurrence.py": ("tests/routing/test_reference.py", *_ROUTING),
    "rmoe/routing/describe.py": ("tests/routing/test_zoo_docs.py", "rmoe/routing/describe.py"),
    "rmoe/routing/cost.py": ("tests/routing/test_zoo_docs.py", "rmoe/routing/cost.py"),
    "rmoe/routing/mechanisms.py": (*_ROUTING, "tests/routing/test_zoo_docs.py"),
    "rmoe/routing/spec.py": (*_ROUTING, "tests/routing/test_zoo_docs.py"),
    "rmoe/model/": ("tests/model",),
    "rmoe/analysis/": ("tests/analysis",),
    "rmoe/compare/statistics.py": (
        "tests/compare/test_definitions.py",
        "rmoe/compare/statistics.py",
        "tests/compare/test_statistics.py",
    ),
    "rmoe/training/checkpoint.py": ("tests/training/test_checkpoint.py",),
}


def tests_of(file: str) -> tuple[str, ...]:
    """Arguments for pytest."""
    return TESTS[max((entry for entry in TESTS if file.startswith(entry)), key=len)]
