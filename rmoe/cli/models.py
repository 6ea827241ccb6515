"""What verbs that take a MODEL have in common: where it is, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from rmoe.errors import RequestError
from rmoe.places import model_place

Plugins: TypeAlias = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def set_up(plugins: tuple[str, ...]) -> None:
    """Before a model is read: import what registers its routers, and keep transformers' progress bars off the screen.

    Raises:
        RequestError: no such plugin.
    """
    from transformers.utils.logging import disable_progress_bar

    from rmoe.training.build import load_plugins

    disable_progress_bar()
    load_plugins(plugins)


def model_folder(path: str | Path, field: str = "MODEL") -> Path:
    """The model folder that is meant; see `rmoe.places.model_place`. A run's folder stands for the `model/` in it.

    Raises:
        RequestError: nothing is there, or a run that has no model yet.
    """
    path = model_place(path, field)
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        if not (path / "model").is_dir():
            raise RequestError(field, str(path), "a finished run, or one of its checkpoints")
        return path / "model"
    return path
