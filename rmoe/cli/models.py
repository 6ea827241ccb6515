"""What verbs that take a MODEL have in common: where it is, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from rmoe.errors import RequestError, one_line

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


def model_folder(path: Path) -> Path:
    """The model folder of a path: itself, or `model/` in it where it is the folder of a run.

    Raises:
        RequestError: a run that has no model yet.
    """
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        if not (path / "model").is_dir():
            raise RequestError("MODEL", str(path), "a finished run, or one of its checkpoints")
        return path / "model"
    return path


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        RequestError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some damage shows itself only in use
        return tokenizer
    except Exception as error:  # a damaged file makes the tokenizers library raise what it likes
        said = one_line(str(error))[:200]
        raise RequestError("MODEL", str(folder), f"a model folder with its tokenizer ({said})") from error
