"""Files of grafted folders: their names, what is copied, and how a folder appears only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rmoe.errors import RequestError
from rmoe.graft.auto import CODE
from rmoe.model.card import is_own
from rmoe.model.weights import CONFIG, INDEX, PICKLES
from rmoe.records import durable_rename

BASE_CONFIG = "base_config.json"  # the original's, as it was
BASE_INDEX = "base_index.json"  # likewise, if it had shards
BASE_WEIGHTS = "model-base.safetensors"  # a single-file original: under its own name it would hide the index
GRAFT_WEIGHTS = "model-rmoe-graft.safetensors"
MORE_WEIGHTS = "model-more.safetensors"  # tensors that no file of the original has
ORIGINALS = "base_tensors.safetensors"  # base tensors that training has changed, as they were; in no index
TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")  # with what generation starts from

_WEIGHT_SUFFIXES = (*PICKLES, ".safetensors", ".gguf")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets the name `out` only when it is whole.

    An empty folder that is there is filled, for it may be a link, a mount, or the shell's own: its configuration comes
    last, without which it is no model.

    Raises:
        RequestError: `out` is there and not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError("--out", str(out), "a folder that is new or empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out if out.exists() else out.parent) as staging:
        folder = Path(staging) / "model"
        folder.mkdir()
        yield folder
        if not out.exists():
            durable_rename(folder, out)
            return
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            durable_rename(path, out / path.name)


def copy_others(
    source: Path, target: Path, only: tuple[str, ...] | None = None, *, same: bool = False
) -> None:
    """Copy what is neither weights nor configuration: tokenizer, generation defaults, chat templates, the card.

    Args:
        only: of these, the files with one of these suffixes.
        same: the target is the same model, so a card that `rmoe` wrote still describes it.
    """
    skipped = {CONFIG, INDEX, BASE_CONFIG, BASE_INDEX, *CODE}
    for path in source.rglob("*"):
        within = path.relative_to(source)
        hidden = any(part.startswith(".") for part in within.parts)
        if (
            path.is_file()
            and not hidden
            and within.name not in skipped
            and path.suffix not in _WEIGHT_SUFFIXES
            and (only is None or path.suffix in only)
            and (same or not is_own(path))
        ):
            (target / within).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / within)
