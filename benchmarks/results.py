"""A benchmark's figures with the date, the code and the machine they come from."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import torch

from rmoe.training.environment import hardware, versions


def write_result(benchmark: str, figures: dict[str, Any], folder: Path | None, device: str = "auto") -> None:
    """Print the result as JSON; with a folder also write `<date>-<benchmark>.json` there.

    Args:
        benchmark: its name.
        figures: what was measured, units in the names.
        folder: where dated results are kept.
        device: what was computed on, as in `training.device`.
    """
    result = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "figures": figures,
        "load_average": round(
            os.getloadavg()[0], 1
        ),  # beyond the cores' number, wall-clock figures say little
        "hardware": msgspec.to_builtins(hardware(torch.get_num_threads(), device)),
        "versions": msgspec.to_builtins(versions()),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{result['date']}-{benchmark}.json").write_text(text + "\n")
