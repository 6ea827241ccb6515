"""What a path or a model's name on the command line means. Imports no torch.

A model, like a tokenizer, is one of three things, decided without asking the network:

    a path that exists      a folder, also one made of links, or a link to it
    hf:NAME, hf:ORG/NAME    a repository of the Hugging Face Hub, downloaded unless it is in the local Hub cache
    NAME, ORG/NAME          such a repository, if it is in the local Hub cache already

Anything else is an error at once: `runs/modle` has the form of a repository's name, and a search of the Hub for a
mistyped folder takes long and ends in advice about tokens.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from rmoe.errors import RequestError, one_line

PREFIX = "hf:"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
# What makes a model: no pickles, no weights of other frameworks, no code.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# The same weights for another program: GPT-OSS has them in `original/`, Mistral beside the model.
_OTHER_COPIES = ["original/*", "metal/*", "consolidated*"]


def expand(path: str | Path, field: str) -> Path:
    """A path with `~` and `~user` replaced, as a shell does where nothing stands before them.

    Raises:
        RequestError: it is empty, there is no such home folder, or the path is not UTF-8: no record of a run could
            name it.
    """
    if not str(path):  # Path("") is the current folder, which nobody has named
        raise RequestError(field, "", "a path")
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RequestError(field, str(path), "a path whose name is UTF-8") from None
    if not path.parts or not path.parts[0].startswith("~") or os.path.exists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise RequestError(
            field, str(path), f"a path without ~, whose folder is not known ({error})"
        ) from None


def model_place(name: str | Path, field: str = "MODEL") -> Path:
    """The folder of a model or tokenizer: the path itself, or a repository's folder in the Hub cache.

    Raises:
        RequestError: there is no such path, and it does not ask for the Hub with `hf:`; or the Hub has no such
            repository, or cannot be reached.
    """
    text = str(name)
    if text.startswith(PREFIX):
        return _downloaded(text.removeprefix(PREFIX), field)
    path = expand(name, field)
    if os.path.exists(path):
        return path
    is_name = _HUB_NAME.fullmatch(text) is not None
    if is_name and (cached := cached_folder(text)) is not None:
        return cached
    allowed = (
        "an existing folder"
        + _near(path)
        + (f", or {PREFIX}{text} for the Hugging Face Hub" if is_name else "")
    )
    raise RequestError(field, text, allowed)


def model_folder(name: str | Path, field: str = "MODEL") -> Path:
    """`model_place`; a run's folder stands for the `model/` in it.

    Raises:
        RequestError: nothing is there, or a run that has no model yet.
    """
    path = model_place(name, field)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    of_run = (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir()
    if of_run and not any(path.glob("*.safetensors")):
        raise RequestError(field, str(path), "a finished run, or a checkpoint of one")
    return path


def tokenizer_place(folder: Path) -> Path | None:
    """Where a model's tokenizer is: with the model, or, for a checkpoint of a finished run, in the run's `model/`."""
    whole = folder.resolve()
    places = [folder, *([whole.parent.parent / "model"] if whole.parent.name == "checkpoints" else [])]
    return next(
        (place for place in places if any((place / name).is_file() for name in TOKENIZER_FILES)), None
    )


def require_writable(out: Path) -> None:
    """Check, before any work, that the folder `--out` can be made and written.

    Raises:
        RequestError: it is something else, or cannot be made.
    """
    above = out
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "" if above == out else f" ({above} is {'read-only' if above.is_dir() else 'no folder'})"
        raise RequestError("--out", str(out), f"a folder that can be written{why}")


def display_name(folder: Path) -> str:
    """What to call a model: its folder's name, or its run's; `ORG/NAME` for a folder of the Hub cache."""
    cached, whole = hub_name(folder), folder.resolve()
    if cached is not None:
        return cached[0]
    return whole.parent.name if whole.name == "model" else whole.name


def hub_name(folder: Path) -> tuple[str, str] | None:
    """(`ORG/NAME`, commit) of a folder of the Hub cache; None for any other folder."""
    folder = folder.absolute()
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), folder.name


def _near(path: Path) -> str:
    """` (did you mean X?)`, where a sibling of the missing folder has nearly its name."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def cached_folder(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the Hub cache; None where it is not there. No network is asked."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(repository, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _downloaded(repository: str, field: str) -> Path:
    if not _HUB_NAME.fullmatch(repository):
        raise RequestError(field, f"{PREFIX}{repository}", f"{PREFIX}NAME or {PREFIX}ORG/NAME")
    try:
        return _snapshot(repository)
    except Exception as error:  # the network, the Hub, the cache's folder: each has its own family of errors
        allowed = f"a repository of the Hugging Face Hub that can be read ({one_line(str(error))[:300]})"
        raise RequestError(field, f"{PREFIX}{repository}", allowed) from None


def _snapshot(repository: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repository, allow_patterns=_FILES, ignore_patterns=_OTHER_COPIES, **options)
    )
