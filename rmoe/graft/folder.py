"""Graft and undo on folders: the base model's weight files are copied as they are, never through a model.

A grafted folder is the original folder with one more weight file, an index that names it, and a configuration of
model type `rmoe_graft`. So a graft needs the memory of one tensor, not of the model, keeps tensors that
transformers would drop, and undo has only to leave out what was added.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from rmoe.errors import RequestError
from rmoe.graft.attach import CELL, OFFSET, attach
from rmoe.graft.auto import AUTO_MAP, CLASS_PREFIX, CODE, GRAFT_MODEL_TYPE, GRAFT_SECTION, graft_section
from rmoe.graft.spec import GraftSpec
from rmoe.model.sharing import write_auto_code
from rmoe.model.weights import (
    CONFIG,
    INDEX,
    PICKLES,
    WEIGHTS,
    WeightFolder,
    digest,
    open_weights,
    read_json,
    tensor_sha256,
    write_index,
    write_json,
)

BASE_CONFIG = "base_config.json"  # the original's, as it was
BASE_INDEX = "base_index.json"  # likewise, if it had shards
BASE_WEIGHTS = "model-base.safetensors"  # a single-file original: under its own name it would hide the index
GRAFT_WEIGHTS = "model-rmoe-graft.safetensors"
ORIGINALS = "base_tensors.safetensors"  # base tensors that training has changed, as they were; in no index

_WEIGHT_SUFFIXES = (*PICKLES, ".safetensors", ".gguf")


@dataclass(frozen=True)
class GraftReport:
    """What `graft_folder` did.

    Attributes:
        model_type: the family.
        gates: module paths of the gates, in layer order.
        added_parameters: cell, projectors and `B`s.
        base_sha256: see `rmoe.model.weights.digest`; what undo checks against.
    """

    model_type: str
    gates: list[str]
    added_parameters: int
    base_sha256: str


@dataclass(frozen=True)
class UndoReport:
    """What `undo_folder` did. `verified` is None if the folder does not say what its original was."""

    model_type: str
    removed_tensors: int
    verified: bool | None


def is_graft_tensor(name: str) -> bool:
    """Whether a tensor's name is one that a graft adds."""
    return f".{OFFSET}." in name or f".{CELL}." in f".{name}"


def graft_folder(source: Path, out: Path, spec: GraftSpec) -> GraftReport:
    """Write a grafted copy of a model folder.

    Args:
        source: a transformers MoE in safetensors, one file or shards.
        out: a folder that does not exist yet, or is empty.

    Raises:
        RequestError: source or output folder will not do, or the model cannot be grafted. Nothing is written.
    """
    weights = open_weights(source)
    config = read_json(source / CONFIG)
    if config.get("model_type") == GRAFT_MODEL_TYPE:
        raise RequestError("model", str(source), "a model without a graft; --undo takes one off")
    model = _empty_model(source, config, weights)
    gates = attach(model, spec).gate_paths()
    added = {name: tensor for name, tensor in model.state_dict().items() if is_graft_tensor(name)}
    architecture = type(model).__name__
    base_sha256 = digest(weights.tensors())
    section = graft_section(spec, config["model_type"], architecture, base_sha256=base_sha256)
    own = {
        "model_type": GRAFT_MODEL_TYPE,
        "architectures": [CLASS_PREFIX + architecture],
        GRAFT_SECTION: section,
    }

    def write(folder: Path) -> None:
        copy_others(source, folder)
        files = {file: BASE_WEIGHTS if file == WEIGHTS else file for file in weights.files}
        for file, target in files.items():
            shutil.copyfile(source / file, folder / target)
        save_file(added, folder / GRAFT_WEIGHTS, metadata={"format": "pt"})
        write_index(WeightFolder(folder, (*files.values(), GRAFT_WEIGHTS)))
        shutil.copyfile(source / CONFIG, folder / BASE_CONFIG)
        if WEIGHTS not in files:
            shutil.copyfile(source / INDEX, folder / BASE_INDEX)
        write_json(folder / CONFIG, config | own)
        write_auto_code(folder, CODE, AUTO_MAP)

    publish(out, write)
    return GraftReport(config["model_type"], gates, sum(t.numel() for t in added.values()), base_sha256)


def undo_folder(source: Path, out: Path, *, keep_trained: bool = False) -> UndoReport:
    """Write the model that a grafted folder was made from.

    Args:
        source: a grafted folder, as `graft_folder`, `save_pretrained` or `rmoe finetune` left it.
        out: a folder that does not exist yet, or is empty.
        keep_trained: accept that base tensors are no longer the original's: the trained base, without the router.

    Raises:
        RequestError: not a graft, or its base tensors have changed. Nothing is written.
    """
    weights = open_weights(source)
    config = read_json(source / CONFIG)
    if config.get("model_type") != GRAFT_MODEL_TYPE:
        raise RequestError("model", str(source), "a folder that `rmoe graft` wrote")
    base = _Base(weights, _originals(source))
    expected = config[GRAFT_SECTION].get("base_sha256")
    verified = None if expected is None else digest(base.tensors()) == expected
    if verified is False and not keep_trained:
        allowed = "a graft whose base was not trained; --keep-trained takes the router off the trained base"
        raise RequestError("model", str(source), allowed)

    def write(folder: Path) -> None:
        copy_others(source, folder)
        base.write(folder)
        if (source / BASE_CONFIG).is_file():
            shutil.copyfile(source / BASE_CONFIG, folder / CONFIG)
        else:
            write_json(folder / CONFIG, _base_config(config))

    publish(out, write)
    return UndoReport(config[GRAFT_SECTION]["base_model_type"], base.num_graft_tensors(), verified)


class _Base:
    """The original tensors of a grafted folder: its base tensors, with those that training changed as they were."""

    def __init__(self, weights: WeightFolder, originals: dict[str, Tensor]) -> None:
        self.weights = weights
        self.originals = originals
        self.files = {file: weights.names(file) for file in weights.files}
        present = {name for names in self.files.values() for name in names}
        self.dropped = {name: tensor for name, tensor in originals.items() if name not in present}

    def num_graft_tensors(self) -> int:
        return sum(is_graft_tensor(name) for names in self.files.values() for name in names)

    def tensors(self, *files: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights.tensors(*files):
            if not is_graft_tensor(name):
                yield name, self.originals.get(name, tensor)
        if not files:
            yield from self.dropped.items()

    def write(self, folder: Path) -> None:
        """Write the tensors, a file for a file; a file that is wholly the base's is copied as it is."""
        written = [file for file, names in self.files.items() if not all(map(is_graft_tensor, names))]
        single = len(written) == 1 and not self.dropped
        for file in written:
            target = folder / (WEIGHTS if single else file)
            if any(is_graft_tensor(name) or name in self.originals for name in self.files[file]):
                save_file(dict(self.tensors(file)), target, metadata={"format": "pt"})
            else:
                shutil.copyfile(self.weights.path / file, target)
        if self.dropped:
            save_file(self.dropped, folder / BASE_WEIGHTS, metadata={"format": "pt"})
            written.append(BASE_WEIGHTS)
        if (self.weights.path / BASE_INDEX).is_file():
            shutil.copyfile(self.weights.path / BASE_INDEX, folder / INDEX)
        elif not single:
            write_index(WeightFolder(folder, tuple(written)))


def keep_originals(base: Path, trained: Path) -> int:
    """Put into a trained grafted folder whatever of its base is needed to undo it exactly.

    `trained` was saved by transformers, which writes only the tensors it loaded, as they are now.

    Args:
        base: the grafted folder that training started from.
        trained: the folder to complete: `ORIGINALS`, the original's configuration, what undo checks against.

    Returns:
        How many tensors had to be kept.
    """
    before = _Base(open_weights(base), _originals(base))
    now = {name: tensor_sha256(tensor) for name, tensor in open_weights(trained).tensors()}
    changed = {name: t for name, t in before.tensors() if now.get(name) != tensor_sha256(t)}
    if changed:
        save_file(changed, trained / ORIGINALS, metadata={"format": "pt"})
    if (base / BASE_CONFIG).is_file():
        shutil.copyfile(base / BASE_CONFIG, trained / BASE_CONFIG)
    return len(changed)


def publish(out: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written beside `out` and give it that name only when it is whole.

    Raises:
        RequestError: `out` is there and not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError("--out", str(out), "a folder that is new or empty")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        folder = Path(staging) / "model"
        folder.mkdir()
        write(folder)
        if out.exists():
            out.rmdir()
        folder.rename(out)


def _empty_model(source: Path, config: dict[str, Any], weights: WeightFolder) -> PreTrainedModel:
    """The base model on the meta device: its modules without their weights."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise RequestError("model_type", model_type, f"one of {len(CONFIG_MAPPING)} that transformers knows")
    parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
    named = getattr(transformers, (config.get("architectures") or ["AutoModelForCausalLM"])[0], None)
    if not isinstance(named, type) or not issubclass(named, PreTrainedModel):
        named = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(parsed), None)
    if named is None:
        raise RequestError("architectures", config.get("architectures"), "a model class of transformers")
    with torch.device("meta"):
        model = named(parsed)
    return model.to(_parameter_dtype(config, weights))


def _parameter_dtype(config: dict[str, Any], weights: WeightFolder) -> torch.dtype:
    """The dtype for the graft: the configuration's, else the first in the files that is not an 8-bit storage type."""
    named = config.get("dtype", config.get("torch_dtype"))
    if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
        return getattr(torch, named)
    return next(
        (t.dtype for _, t in weights.tensors() if t.is_floating_point() and t.itemsize > 1), torch.float32
    )


def _originals(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / ORIGINALS) if (folder / ORIGINALS).is_file() else {}


def _base_config(config: dict[str, Any]) -> dict[str, Any]:
    section = config[GRAFT_SECTION]
    own = {"model_type": section["base_model_type"], "architectures": [section["base_architecture"]]}
    return {key: value for key, value in config.items() if key not in (GRAFT_SECTION, "auto_map")} | own


def copy_others(source: Path, target: Path) -> None:
    """Copy what is neither weights nor configuration: tokenizer, generation defaults, chat templates, the card."""
    skipped = {CONFIG, INDEX, BASE_CONFIG, BASE_INDEX, *CODE}
    for path in source.rglob("*"):
        within = path.relative_to(source)
        hidden = any(part.startswith(".") for part in within.parts)
        if (
            path.is_file()
            and not hidden
            and within.name not in skipped
            and path.suffix not in _WEIGHT_SUFFIXES
        ):
            (target / within).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / within)
