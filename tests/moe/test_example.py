"""`examples/replay.py` does what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "replay.py"


def test_a_replayed_generation_is_nearer_to_what_generated_it() -> None:
    live, replayed = runpy.run_path(str(EXAMPLE))["main"]()
    assert replayed < 0.8 * live
