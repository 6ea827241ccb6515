"""What verbs that take a MODEL have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from rmoe.places import model_folder, tokenizer_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model: TypeAlias = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL",
        help="a model folder, the folder of a finished run, or hf:NAME of the Hugging Face Hub.",
    ),
]
Plugins: TypeAlias = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(help="modules or files (`my_router.py`) that register the routers of MODEL."),
]


def set_up(plugins: tuple[str, ...]) -> None:
    """Before a model is read: import what registers its routers, and keep transformers' progress bars off the screen.

    Raises:
        RequestError: no such plugin.
    """
    from transformers.utils.logging import disable_progress_bar

    from rmoe.training.build import load_plugins

    disable_progress_bar()
    load_plugins(plugins)


def open_model(
    model: Path, plugins: tuple[str, ...], device: str | None = None
) -> tuple[PreTrainedModel, Any, Path]:
    """A language model, its tokenizer, whose `name_or_path` is where it lies, and the model's folder.

    Raises:
        RequestError: whatever is wrong with one of them, or they do not fit each other.
    """
    from rmoe.training.language_model import load_language_model, load_tokenizer, require_rows

    set_up(plugins)
    folder = model_folder(model)
    language_model = load_language_model(folder, device=device)
    tokenizer = load_tokenizer(tokenizer_place(folder) or folder)
    require_rows(language_model, tokenizer, folder)
    return language_model, tokenizer, folder
