"""The table of families in the guide is the packaged one, which `rmoe families` prints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import transformers

from rmoe.cli.families import FAMILIES, markdown_table
from rmoe.cli.main import main
from tests.graft.tiny_families import PROMISED, moe_model_types, try_families

GUIDE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
TABLE = GUIDE[GUIDE.index("| model type |") :].splitlines()
PACKAGED = json.loads(FAMILIES.read_text())


def test_the_guide_has_the_packaged_table() -> None:
    assert markdown_table(PACKAGED["families"]).splitlines() == TABLE
    assert f"transformers {PACKAGED['transformers']};" in GUIDE
    assert f"the first {PACKAGED['promised']} are promised" in GUIDE


def test_every_model_type_has_a_row_and_the_promised_ones_work() -> None:
    if transformers.__version__ != PACKAGED["transformers"]:
        pytest.skip("the table was made with another transformers")
    assert PACKAGED["promised"] == len(PROMISED)
    assert [row for row in TABLE[2:] if row.endswith("| yes | yes |  |")][: len(PROMISED)] == TABLE[
        2 : 2 + len(PROMISED)
    ]
    assert [row.split("`")[1] for row in TABLE[2:]] == moe_model_types()


def test_the_list_prints_it_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    assert capsys.readouterr().out.endswith("\n".join(TABLE) + "\n")
    assert main(["families", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PACKAGED["families"]
    program = (
        "import sys; from rmoe.cli.main import main; main(['families']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_at_least_sixty_families_are_read_and_the_others_say_why_not() -> None:
    assert sum(row["read"] for row in PACKAGED["families"]) >= 60
    assert all(row["note"] for row in PACKAGED["families"] if not (row["read"] and row["graft"]))


@pytest.mark.slow
def test_the_table_is_current() -> None:
    """`python -m tests.graft.tiny_families` mends it."""
    if transformers.__version__ != PACKAGED["transformers"]:
        pytest.skip("the table was made with another transformers")
    assert [asdict(row) for row in try_families()] == PACKAGED["families"]
