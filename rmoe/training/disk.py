"""Whether a run's checkpoints will fit on the disk, asked before anything is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from rmoe.errors import RequestError

MOMENTS = 2
"""AdamW's, in float32 like the weights."""


def bytes_of_a_run(model: nn.Module, keep: int, average: bool = False) -> int:
    """The most a run of this model holds at once: `keep` checkpoints, one being written, the final model.

    Args:
        average: a checkpoint has the averaged weights too.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    moments = MOMENTS * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    checkpoint = weights + moments + (weights if average else 0)
    return (keep + 1) * checkpoint + weights


def require_space(out: Path, model: nn.Module, keep: int, average: bool) -> None:
    """Check that a new run fits.

    Raises:
        RequestError: it does not.
    """
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    needed, free = bytes_of_a_run(model, keep, average), shutil.disk_usage(there).free
    if needed > free:
        raise RequestError(
            "--out",
            str(out),
            f"a disk with {needed / 2**30:.2f} GiB free, for {keep + 1} checkpoints and the model; "
            f"this one has {free / 2**30:.2f}",
        )
