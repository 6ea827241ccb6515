"""The table of families in the guide is the command's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from rmoe.graft.families import PROMISED, markdown_table, moe_model_types, try_families

GUIDE = (Path(__file__).parents[2] / "docs" / "graft.md").read_text()
TABLE = GUIDE[GUIDE.index("| model type |") :].splitlines()


def test_every_model_type_has_a_row_and_the_promised_ones_work() -> None:
    if f"transformers {transformers.__version__};" not in GUIDE:
        pytest.skip("the table was made with another transformers")
    assert [row.split("`")[1] for row in TABLE[2:]] == moe_model_types()
    assert [row for row in TABLE[2:] if row.endswith("| yes |  |")][: len(PROMISED)] == TABLE[
        2 : 2 + len(PROMISED)
    ]


@pytest.mark.slow
def test_the_table_is_current() -> None:
    """`rmoe graft --list` mends it."""
    if f"transformers {transformers.__version__};" not in GUIDE:
        pytest.skip("the table was made with another transformers")
    assert markdown_table(try_families()).splitlines() == TABLE
