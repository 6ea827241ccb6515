"""Graft a model folder, without building its model: as an adapter, or as a standalone folder.

A standalone folder is the original folder with one more weight file, an index that names it, and a configuration of
model type `rmoe_graft`. The base's weight files are copied as they are. So a graft needs the memory of one tensor,
keeps tensors that transformers would drop, and undo has only to skip what was added.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from rmoe.errors import RequestError
from rmoe.graft.adapter import write_adapter
from rmoe.graft.attach import CELL, OFFSET, attach
from rmoe.graft.auto import AUTO_MAP, CLASS_PREFIX, CODE, graft_section
from rmoe.graft.base import GRAFT_MODEL_TYPE, GRAFT_SECTION, Base
from rmoe.graft.card import graft_card
from rmoe.graft.files import (
    BASE_CONFIG,
    BASE_INDEX,
    BASE_WEIGHTS,
    GRAFT_WEIGHTS,
    TOKENIZER_FILES,
    copy_others,
    new_folder,
)
from rmoe.graft.spec import GraftSpec
from rmoe.model.auto_code import write_auto_code
from rmoe.model.card import write_card
from rmoe.model.loading import empty_model, model_class
from rmoe.model.weights import (
    CONFIG,
    INDEX,
    WEIGHTS,
    WeightFolder,
    digest,
    open_weights,
    read_json,
    write_index,
    write_json,
)


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


def is_graft_tensor(name: str) -> bool:
    """Whether a tensor's name is one that a graft adds."""
    return f".{OFFSET}." in name or f".{CELL}." in f".{name}"


def graft_folder(source: Path, out: Path, spec: GraftSpec, *, full: bool = False) -> GraftReport:
    """Graft a model folder.

    Args:
        source: a transformers MoE in safetensors, one file or shards.
        out: a folder that does not exist yet, or is empty.
        full: write a standalone folder, with a copy of the base's weights, not an adapter that points to them.

    Raises:
        RequestError: source or output folder will not do, or the model cannot be grafted. Nothing is written.
    """
    weights = open_weights(source)
    config = read_json(source / CONFIG)
    if config.get("model_type") == GRAFT_MODEL_TYPE:
        raise RequestError("model", str(source), "a model without a graft; --undo takes one off")
    model = _empty_model(config, weights)
    gates = [layer.gate_name for layer in attach(model, spec)]
    added = {name: tensor for name, tensor in model.state_dict().items() if is_graft_tensor(name)}
    architecture = type(model).__name__
    base_sha256 = digest(weights.tensors())
    section = graft_section(spec, config["model_type"], architecture, base_sha256=base_sha256)
    own = {
        "model_type": GRAFT_MODEL_TYPE,
        "architectures": [CLASS_PREFIX + architecture],
        GRAFT_SECTION: section,
    }

    report = GraftReport(config["model_type"], gates, sum(t.numel() for t in added.values()), base_sha256)
    card = graft_card(source, report.model_type, len(gates), report.added_parameters, spec)

    with new_folder(out) as folder:
        if full:  # has the base's own card, which undo gives back
            copy_others(source, folder)
            _write_standalone(folder, weights, added, config | own)
        else:
            copy_others(source, folder, TOKENIZER_FILES)
            write_adapter(folder, added, config | own, Base.of(weights).seen_from(out))
            write_card(folder, card)
    return report


def _write_standalone(
    folder: Path, base: WeightFolder, added: dict[str, Tensor], config: dict[str, Any]
) -> None:
    files = {file: BASE_WEIGHTS if file == WEIGHTS else file for file in base.files}
    for file, target in files.items():
        shutil.copyfile(base.path / file, folder / target)
    save_file(added, folder / GRAFT_WEIGHTS, metadata={"format": "pt"})
    write_index(WeightFolder(folder, (*files.values(), GRAFT_WEIGHTS)))
    shutil.copyfile(base.path / CONFIG, folder / BASE_CONFIG)
    if WEIGHTS not in files:
        shutil.copyfile(base.path / INDEX, folder / BASE_INDEX)
    write_json(folder / CONFIG, config)
    write_auto_code(folder, CODE, AUTO_MAP)


def _empty_model(config: dict[str, Any], weights: WeightFolder) -> PreTrainedModel:
    """The base model without its weights, in the dtype for the graft."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise RequestError("model_type", model_type, f"one of {len(CONFIG_MAPPING)} that transformers knows")
    parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
    if model_class(parsed) is AutoModelForCausalLM and type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RequestError("architectures", config.get("architectures"), "a model class of transformers")
    model = empty_model(parsed)
    return model.to(_parameter_dtype(config, weights))


def _parameter_dtype(config: dict[str, Any], weights: WeightFolder) -> torch.dtype:
    """The dtype for the graft: the configuration's, else the first in the files that is not an 8-bit storage type."""
    named = config.get("dtype", config.get("torch_dtype"))
    if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
        return getattr(torch, named)
    return next(
        (t.dtype for _, t in weights.tensors() if t.is_floating_point() and t.itemsize > 1), torch.float32
    )
