"""The tensors of a sharded run's checkpoint, through `torch.distributed.checkpoint`, as safetensors.

Every process writes its own parts, `shard-*.safetensors` with the offsets in the header; nobody ever holds the whole
model and nothing is pickled (torch's own format has a pickled index). Names are `model/<name>` and
`optimizer/<parameter>/<slot>`. Any number of processes, and any layout, can read them back.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from rmoe.training.checkpoint import Damaged
from rmoe.training.state import TrainingState, check_slots, group_names

PATTERN = "shard-*.safetensors"


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was written by `save`."""
    return any(folder.glob(PATTERN))


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a run, by the name it has in a checkpoint; the optimizer's must exist."""
    found = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for group, names in zip(optimizer.param_groups, group_names(optimizer, model), strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{name}/{slot}"] = value
    return found


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this process's parts. Collective; the folder must exist on all processes' common disk."""
    tensors = {name: tensor.detach() for name, tensor in tensors_of(model, optimizer).items()}
    # A scalar has no offsets to write: the optimizer's step counters are stored with one dimension.
    tensors = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)


def adopt(parts: Path, folder: Path) -> None:
    """Move the parts that all processes have written into a checkpoint's folder. By one process."""
    for path in sorted(parts.iterdir()):
        path.rename(folder / path.name)
    parts.rmdir()


def check(folder: Path, state: TrainingState, model: nn.Module) -> None:
    """Compare names and dtypes of the parts, and how much of each tensor they hold, with the model's.

    Raises:
        Damaged: anything is missing, added, or of another size.
    """
    sizes = _sizes(folder)
    slots = [name.removeprefix("optimizer/") for name in sizes if name.startswith("optimizer/")]
    check_slots(slots, state.optimizer_tensors)
    expected = {f"model/{name}": max(t.numel(), 1) for name, t in model.state_dict().items()}
    parameters = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    for group in state.param_groups:
        for name in group["params"]:
            if name not in parameters:
                raise Damaged(f"{name} is no trained parameter of this model")
            if f"{name}/step" in slots:  # one that never had a gradient has no state
                for slot in ("exp_avg", "exp_avg_sq"):
                    expected[f"optimizer/{name}/{slot}"] = parameters[name]
                expected[f"optimizer/{name}/step"] = 1
    for name in sorted(expected.keys() | sizes.keys()):
        if name not in sizes:
            raise Damaged(f"{name} is missing")
        if name not in expected:
            raise Damaged(f"{name} is not in this model")
        if sizes[name] != expected[name]:
            raise Damaged(f"{name} has {sizes[name]} elements, not {expected[name]}")


def _sizes(folder: Path) -> dict[str, int]:
    """Elements of each tensor in all parts together, from their headers.

    Raises:
        Damaged: a part is not safetensors.
    """
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob(PATTERN)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    elements = math.prod(file.get_slice(name).get_shape())
                    sizes[name] = sizes.get(name, 0) + elements
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path.name}: {' '.join(str(error).split())}") from None
    return sizes


def load_model(folder: Path, model: nn.Module) -> None:
    """Read the model's tensors, each process its own parts. Collective where there are several."""
    _load(folder, {f"model/{name}": tensor for name, tensor in model.state_dict().items()})


def load_optimizer(
    folder: Path, state: TrainingState, optimizer: torch.optim.Optimizer, model: nn.Module
) -> None:
    """Read the optimizer's tensors into moments made for the purpose, sharded as their parameters are.

    Groups may be cut differently than when they were saved (one per device mesh): settings go by parameter.
    """
    present = _sizes(folder)
    settings = {name: stored for stored in state.param_groups for name in stored["params"]}
    for group, names in zip(optimizer.param_groups, group_names(optimizer, model), strict=True):
        stored = settings[names[0]]
        for key, value in stored.items():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for parameter, name in zip(group["params"], names, strict=True):
            if f"optimizer/{name}/step" not in present:
                continue
            moments: dict[str, Any] = {
                slot: torch.zeros_like(parameter) for slot in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}
    tensors = tensors_of(model, optimizer)
    _load(folder, {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")})


@torch.no_grad()
def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place."""
    targets = {name: t.detach().reshape(1) if t.dim() == 0 else t.detach() for name, t in tensors.items()}
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
