"""A graft as an adapter: a folder with the graft's own tensors, and a pointer to the base they belong to.

    graft.safetensors   cell, projectors and `B`s; after training also each tensor of the base that has changed
    config.json         model type `rmoe_graft`: the base's configuration, the graft, the base's place and digests

Beside them are the base's tokenizer files, so that the folder can be used wherever a model folder can.
`rmoe.graft.join` reads such a folder.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rmoe.errors import RequestError
from rmoe.graft.auto import AUTO_MAP, CODE
from rmoe.graft.base import GRAFT_SECTION, POINTER, Base, open_base, require_family
from rmoe.graft.files import copy_others, new_folder
from rmoe.graft.join import JoinsBase
from rmoe.model.auto_code import write_auto_code
from rmoe.model.weights import (
    ADAPTER,
    CONFIG,
    INDEX,
    WeightFolder,
    digest,
    open_weights,
    read_json,
    write_json,
)
from rmoe.places import model_place


def save_adapter(model: PreTrainedModel, out: str | Path, *, base: str | Path | None = None) -> None:
    """Write a grafted model in memory as an adapter; `save_pretrained` writes a standalone folder.

    Needs the disk space of a standalone folder while it writes.

    Args:
        model: grafted in memory, or loaded from an adapter.
        out: a folder that does not exist yet, or is empty.
        base: the folder of the model it was made from, or its name on the Hub; default where the adapter's base was.

    Raises:
        RequestError: no base is known, it is of another family or has changed since it was loaded, or `out` is not
            empty. Nothing is written.
    """
    weights = None if base is None else open_base(model_place(base, "base"))

    with new_folder(Path(out)) as folder:
        model.save_pretrained(folder)
        strip(folder, model, Path(out), weights)


def strip(folder: Path, model: PreTrainedModel, place: Path, base: WeightFolder | None = None) -> int:
    """Make an adapter of the standalone folder that a grafted model's `save_pretrained` wrote.

    What stays is each tensor that the base does not have, or has with other values: a tensor is the base's if the
    base's values, in the dtype the tensor has, are the same bit for bit.

    Args:
        model: what was saved; it knows its base if it was loaded from an adapter.
        place: where the folder will be.
        base: the weights of another base.

    Returns:
        How many tensors the adapter has.

    Raises:
        RequestError: no base is known, it is of another family, or it has changed since the model was loaded.
    """
    weights, config = open_weights(folder), read_json(folder / CONFIG)
    section = config[GRAFT_SECTION]
    if base is None:
        if not isinstance(model, JoinsBase) or model.graft_base is None or model.graft_place is None:
            raise RequestError("base", None, "the folder of the model that was grafted")
        base = model.graft_base.open(place, section, moved=model.graft_place)
    else:
        require_family(base, section)
        section |= {"base_sha256": digest(base.tensors())}
    kept, seen = _kept(weights, base)
    unused = tuple(sorted({name for file in base.files for name in base.names(file)} - seen))
    pointer = msgspec.structs.replace(Base.of(base), unused=unused)
    write_adapter(folder, kept, config, pointer.seen_from(place))
    for file in (*weights.files, INDEX):
        (folder / file).unlink(missing_ok=True)
    return len(kept)


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], base: Base) -> None:
    """Write `graft.safetensors`, `config.json` and the code that finds this package."""
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    section = config[GRAFT_SECTION] | {POINTER: msgspec.to_builtins(base)}
    write_json(folder / CONFIG, config | {GRAFT_SECTION: section})
    write_auto_code(folder, CODE, AUTO_MAP)


def move_adapter(source: Path, out: Path, base: str | Path) -> Base:
    """Write a copy of an adapter that finds its base at another place.

    Raises:
        RequestError: `source` is no adapter, or the base is another model (all bytes are compared). Nothing is written.
    """
    config = read_json(source / CONFIG)
    pointer = Base.of_config(config, str(source))
    if pointer is None:
        raise RequestError("--base", str(base), f"an adapter; {source} has its base in it")
    weights = open_weights(source)
    found = Base.of(pointer.open(source, config[GRAFT_SECTION], moved=base, full=True))
    moved = msgspec.structs.replace(found, unused=pointer.unused).seen_from(out)

    with new_folder(out) as folder:
        copy_others(source, folder, same=True)
        write_adapter(folder, dict(weights.tensors()), config, moved)
    return moved


def _kept(weights: WeightFolder, base: WeightFolder) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors that the base has not, and the names of all."""
    kept, seen = {}, set()
    with ExitStack() as stack:
        before: dict[str, Any] = {}
        for file in base.files:
            opened = stack.enter_context(safe_open(base.path / file, framework="pt"))
            before |= dict.fromkeys(opened.keys(), opened)
        for name, tensor in weights.tensors():
            seen.add(name)
            if name not in before or not _same(before[name].get_tensor(name), tensor):
                kept[name] = tensor
    return kept, seen


def _same(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape:
        return False
    before = before.to(now.dtype)
    return torch.equal(before.reshape(-1).view(torch.uint8), now.reshape(-1).view(torch.uint8))
