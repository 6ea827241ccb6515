"""The registered cases, in the order of the report."""

# isort: off
from benchmarks.cases import router, block, step, inference, around  # noqa: F401  each registers its own

# isort: on
from benchmarks.cases.registry import CASES, COMPILED, Case, Contestants, Setting, setting_for

__all__ = ["CASES", "COMPILED", "Case", "Contestants", "Setting", "setting_for"]
