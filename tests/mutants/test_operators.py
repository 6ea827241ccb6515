"""The mutants are what they say: one change each, every part of the sample, and keys that other edits leave alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants.operators import mutants
from tests.mutants.table import PARTS, TESTS, selection

ROOT = Path(__file__).resolve().parents[2]

SOURCE = '''
"""Text is left alone."""
LIMIT: float = 0.5


class Router:
    def update(self, layer: int, counts: list[int], mask=None) -> float:
        if mask is not None and layer < 3:
            raise ValueError(f"{1 + 1} words of an error")
        self.seen += 1
        total = max(counts[layer], 1) + mean(counts, mask, keepdim=True)
        return -total.clamp(min=0) if self.flag else self.layer
'''

EXPECTED = {
    ("constant", "0.5", "1.0"),
    ("boolean", "mask is not None and layer < 3", "mask is not None or layer < 3"),
    ("operand", "mask is not None and layer < 3", "mask is not None"),
    ("negate", "mask is not None", "mask is None"),
    ("negate", "layer < 3", "layer >= 3"),
    ("boundary", "layer < 3", "layer <= 3"),
    ("statement", "raise ValueError(f'{1 + 1} words of an error')", "pass"),
    ("statement", "self.seen += 1", "pass"),
    ("arithmetic", "self.seen += 1", "self.seen -= 1"),
    ("call", "max(counts[layer], 1)", "counts[layer]"),
    ("name", "max(counts[layer], 1)", "min(counts[layer], 1)"),
    ("layer", "counts[layer]", "counts[0]"),
    ("none", "mean(counts, mask, keepdim=True)", "mean(counts, None, keepdim=True)"),
    ("name", "mean(counts, mask, keepdim=True)", "sum(counts, mask, keepdim=True)"),
    ("keyword", "mean(counts, mask, keepdim=True)", "mean(counts, mask)"),
    ("constant", "True", "False"),
    ("sign", "-total.clamp(min=0)", "total.clamp(min=0)"),
    ("call", "total.clamp(min=0)", "total"),
    (
        "branch",
        "-total.clamp(min=0) if self.flag else self.layer",
        "-total.clamp(min=0) if True else self.layer",
    ),
    ("layer", "self.layer", "0"),
}


def lines(tree: ast.Module) -> list[str]:
    return ast.unparse(tree).splitlines()


def test_each_mutant_changes_one_place() -> None:
    plain = lines(ast.parse(SOURCE))
    found = set()
    for mutant in mutants("x.py", SOURCE):
        compile(mutant.tree, "x.py", "exec")
        changed = [(a, b) for a, b in zip(plain, lines(mutant.tree), strict=True) if a != b]
        assert len(changed) == 1, mutant[:7]
        found.add((mutant.operator, mutant.before, mutant.after))
    assert found >= EXPECTED
    assert not any("words" in before and operator != "statement" for operator, before, _ in found)


def test_keys_do_not_depend_on_other_code() -> None:
    before = {m.key for m in mutants("x.py", SOURCE)}
    longer = SOURCE.replace("class Router", "def other() -> int:\n    return 7\n\n\nclass Router")
    after = {m.key for m in mutants("x.py", longer)}
    assert len(before) == len(list(mutants("x.py", SOURCE)))
    assert before < after
    assert not before & {m.key for m in mutants("y.py", SOURCE)}


def test_the_sample_is_fixed_and_its_tests_exist() -> None:
    from tests.mutants.__main__ import sample

    chosen = sample()
    assert len(chosen) == len({m.key for m in chosen}) == sum(PARTS.values()) >= 300
    for tests in TESTS.values():
        for test in tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), test
            assert not name or f"def {name}(" in (ROOT / file).read_text(), test


@pytest.mark.parametrize(
    ("file", "first"),
    [
        ("rmoe/routing/gate.py", "tests/routing/test_mechanisms.py"),
        ("rmoe/routing/describe.py", "tests/routing/test_zoo_docs.py"),
        ("rmoe/model/layers.py", "tests/model/test_blocks.py"),
    ],
)
def test_the_longest_entry_counts(file: str, first: str) -> None:
    assert selection(file)[0] == first
