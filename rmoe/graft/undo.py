"""Undo a graft: the model it was made from, out of a standalone folder or from beside an adapter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rmoe.errors import RequestError
from rmoe.graft.auto import CLASS_PREFIX
from rmoe.graft.base import GRAFT_MODEL_TYPE, GRAFT_SECTION, NEW_TENSORS, Base
from rmoe.graft.files import (
    BASE_CONFIG,
    BASE_INDEX,
    BASE_WEIGHTS,
    MORE_WEIGHTS,
    ORIGINALS,
    copy_others,
    new_folder,
)
from rmoe.graft.folder import is_graft_tensor
from rmoe.model.weights import (
    CONFIG,
    INDEX,
    WEIGHTS,
    WeightFolder,
    digest,
    open_weights,
    read_json,
    tensor_sha256,
    write_index,
    write_json,
)


@dataclass(frozen=True)
class UndoReport:
    """What `undo_folder` did. `verified` is None if the folder does not say what its original was."""

    model_type: str
    removed_tensors: int
    verified: bool | None


def undo_folder(
    source: Path, out: Path, *, keep_trained: bool = False, base: str | Path | None = None
) -> UndoReport:
    """Write the model that a grafted folder was made from.

    An adapter's base is copied, after all its bytes have been compared with the adapter's digest.

    Args:
        source: a grafted folder, as `graft_folder`, `save_pretrained`, `save_adapter` or `rmoe finetune` left it.
        out: a folder that does not exist yet, or is empty.
        keep_trained: the trained base, without the router, where base tensors are no longer the original's. Without
            it an adapter gives the original; a standalone folder that no longer has it is refused.
        base: where an adapter's base is, if not where the adapter says.

    Raises:
        RequestError: not a graft, or its base tensors have changed. Nothing is written.
    """
    weights, config = open_weights(source), read_json(source / CONFIG)
    if config.get("model_type") != GRAFT_MODEL_TYPE:
        raise RequestError("model", str(source), "a folder that `rmoe graft` wrote")
    pointer = Base.of_config(config, str(source))
    if pointer is not None:
        return _undo_adapter(weights, config, pointer, out, keep_trained, base)
    if base is not None:
        raise RequestError("--base", str(base), f"an adapter; {source} has its base in it")
    original = _standalone(weights, config)
    if keep_trained and (original.instead or original.unused):
        original = _Original(weights, {})
    expected = config[GRAFT_SECTION].get("base_sha256")
    verified = None if expected is None else digest(original.tensors()) == expected
    if verified is False and not keep_trained:
        allowed = "a graft whose base was not trained; --keep-trained takes the router off the trained base"
        raise RequestError("model", str(source), allowed)

    with new_folder(out) as folder:
        copy_others(source, folder)
        original.write(folder)
        if (source / BASE_CONFIG).is_file() and verified is not False:
            shutil.copyfile(source / BASE_CONFIG, folder / CONFIG)
        else:
            write_json(folder / CONFIG, _base_config(config))
    return UndoReport(config[GRAFT_SECTION]["base_model_type"], original.num_graft_tensors(), verified)


def _undo_adapter(
    own: WeightFolder,
    config: dict[str, Any],
    pointer: Base,
    out: Path,
    keep_trained: bool,
    moved: str | Path | None,
) -> UndoReport:
    section = config[GRAFT_SECTION]
    weights = pointer.open(own.path, section, moved=moved, full=True)
    names = [name for file in own.files for name in own.names(file)]
    trained = {name: t for name, t in own.tensors() if not is_graft_tensor(name)} if keep_trained else {}
    changed = bool(trained) or (keep_trained and bool(pointer.unused))
    result = _Original(weights, trained, pointer.unused if changed else ())

    with new_folder(out) as folder:
        copy_others(weights.path, folder)
        result.write(folder)
        if changed:
            write_json(folder / CONFIG, _base_config(config))
        else:
            shutil.copyfile(weights.path / CONFIG, folder / CONFIG)
    return UndoReport(section["base_model_type"], sum(map(is_graft_tensor, names)), not changed)


class _Original:
    """The tensors of a base: those in its files, without the graft's, and some in the place of others.

    Args:
        weights: the files.
        instead: tensors that take the place of theirs, or are not in them.
        unused: names to drop.
    """

    def __init__(
        self, weights: WeightFolder, instead: dict[str, Tensor], unused: tuple[str, ...] = ()
    ) -> None:
        self.weights = weights
        self.instead = instead
        self.unused = frozenset(unused)
        self.files = {file: weights.names(file) for file in weights.files}
        present = {name for names in self.files.values() for name in names}
        self.more = {name: tensor for name, tensor in instead.items() if name not in present}

    def num_graft_tensors(self) -> int:
        return sum(is_graft_tensor(name) for names in self.files.values() for name in names)

    def tensors(self, *files: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights.tensors(*files):
            if not self._skips(name):
                yield name, self.instead.get(name, tensor)
        if not files:
            yield from self.more.items()

    def _skips(self, name: str) -> bool:
        return is_graft_tensor(name) or name in self.unused

    def write(self, folder: Path) -> None:
        """Write the tensors, a file for a file; a file that stays as it is is copied."""
        written = [file for file, names in self.files.items() if not all(map(self._skips, names))]
        index = self._index()
        single = len(written) == 1 and not self.more and index is None  # an index names files
        for file in written:
            target = folder / (WEIGHTS if single else file)
            if any(self._skips(name) or name in self.instead for name in self.files[file]):
                save_file(dict(self.tensors(file)), target, metadata={"format": "pt"})
            else:
                shutil.copyfile(self.weights.path / file, target)
        if self.more:
            if WEIGHTS in written:  # under its own name it would hide the index
                (folder / WEIGHTS).rename(folder / BASE_WEIGHTS)
                written[written.index(WEIGHTS)] = BASE_WEIGHTS
            save_file(self.more, folder / MORE_WEIGHTS, metadata={"format": "pt"})
            written.append(MORE_WEIGHTS)
        if index is not None:
            shutil.copyfile(index, folder / INDEX)
        elif not single:
            write_index(WeightFolder(folder, tuple(written)))

    def _index(self) -> Path | None:
        """The original's own index, where it still fits."""
        kept = self.weights.path / BASE_INDEX
        if kept.is_file():
            return kept
        own = self.weights.path / INDEX
        as_it_was = not self.more and not self.unused and not self.num_graft_tensors()
        return own if as_it_was and own.is_file() else None


def keep_originals(base: Path, trained: Path) -> int:
    """Put into a trained standalone folder whatever of its base is needed to undo it exactly.

    `trained` was saved by transformers, which writes only the tensors it loaded, as they are now.

    Args:
        base: the grafted folder that training started from, of either form.
        trained: the folder to complete: `ORIGINALS`, the original's configuration, what undo checks against.

    Returns:
        How many tensors had to be kept.
    """
    own, config = open_weights(base), read_json(base / CONFIG)
    pointer = Base.of_config(config, str(base))
    if pointer is None:
        before, original_config = _standalone(own, config), base / BASE_CONFIG
    else:
        weights = pointer.open(base, config[GRAFT_SECTION])
        before, original_config = _Original(weights, {}), weights.path / CONFIG
    now = {name: tensor_sha256(tensor) for name, tensor in open_weights(trained).tensors()}
    known, changed = set(), {}
    for name, tensor in before.tensors():
        known.add(name)
        if now.get(name) != tensor_sha256(tensor):
            changed[name] = tensor
    # Of a classifier's head, say: it is not the original's, and undo leaves it out.
    new = sorted(name for name in now.keys() - known if not is_graft_tensor(name))
    trained_config = read_json(trained / CONFIG)
    trained_config[GRAFT_SECTION][NEW_TENSORS] = new
    write_json(trained / CONFIG, trained_config)
    if changed:
        save_file(changed, trained / ORIGINALS, metadata={"format": "pt"})
    if original_config.is_file():
        shutil.copyfile(original_config, trained / BASE_CONFIG)
    return len(changed)


def _standalone(weights: WeightFolder, config: dict[str, Any]) -> _Original:
    originals, new = weights.path / ORIGINALS, config[GRAFT_SECTION].get(NEW_TENSORS, ())
    return _Original(weights, load_file(originals) if originals.is_file() else {}, tuple(new))


def _base_config(config: dict[str, Any]) -> dict[str, Any]:
    section = config[GRAFT_SECTION]
    now = [name.removeprefix(CLASS_PREFIX) for name in config.get("architectures") or []]
    own = {
        "model_type": section["base_model_type"],
        "architectures": now or [section["base_architecture"]],
    }
    return {key: value for key, value in config.items() if key not in (GRAFT_SECTION, "auto_map")} | own
