"""The tensors of a run whose processes hold parts of them, through `torch.distributed.checkpoint`, as safetensors.

Every process writes its own parts, `shard-*.safetensors` with the offsets in the header; nobody ever holds the whole
model and nothing is pickled (torch's own format has a pickled index). Names are `model/<name>` and
`optimizer/<parameter>/<slot>`. Any number of processes, and any layout, can read them back, and `read` gets the same
tensors, whole or in parts, out of a checkpoint that whole processes wrote (`rmoe.training.state`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from rmoe.training import state as contents
from rmoe.training.checkpoint import Damaged
from rmoe.training.state import TrainingState

PATTERN = "shard-*.safetensors"
MODEL, OPTIMIZER = "model/", "optimizer/"
MOMENTS = ("exp_avg", "exp_avg_sq")

Read = Callable[[Path, Mapping[str, Tensor]], None]


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was written by `save`."""
    return any(folder.glob(PATTERN))


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every tensor of a model and of its optimizer, by the name it has in a checkpoint; the optimizer's must exist."""
    found = {f"{MODEL}{name}": tensor for name, tensor in contents.unique_tensors(model).items()}
    if optimizer is not None:
        moments = contents.optimizer_tensors(optimizer, model)
        found |= {f"{OPTIMIZER}{name}": tensor for name, tensor in moments.items()}
    return found


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this process's parts. Collective; the folder must exist on all processes' common disk."""
    # A scalar has no offsets to write: the optimizer's step counters are stored with one dimension.
    tensors = {name: _with_dimension(t) for name, t in tensors_of(model, optimizer).items()}
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def adopt(parts: Path, folder: Path) -> None:
    """Move the parts that all processes have written into a checkpoint's folder. By one process."""
    for path in sorted(parts.iterdir()):
        path.rename(folder / path.name)
    parts.rmdir()


def check(
    folder: Path, state: TrainingState, expected: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Compare names of the parts, and how much of each tensor they hold, with the model's.

    Args:
        expected: `unique_tensors` of the whole model. trained: of these, what has optimizer state.

    Raises:
        Damaged: anything is missing, added, or of another size.
    """
    sizes = _sizes(folder)
    slots = [name.removeprefix(OPTIMIZER) for name in sizes if name.startswith(OPTIMIZER)]
    contents.check_slots(slots, state.optimizer_tensors)
    wanted = {f"{MODEL}{name}": max(t.numel(), 1) for name, t in expected.items()}
    for group in state.param_groups:
        for name in group["params"]:
            if name not in trained:
                raise Damaged(f"{name} is no trained parameter of this model")
            if f"{name}/step" in slots:  # one that never had a gradient has no state
                for slot in MOMENTS:
                    wanted[f"{OPTIMIZER}{name}/{slot}"] = trained[name].numel()
                wanted[f"{OPTIMIZER}{name}/step"] = 1
    for name in sorted(wanted.keys() | sizes.keys()):
        if name not in sizes:
            raise Damaged(f"{name} is missing")
        if name not in wanted:
            raise Damaged(f"{name} is not in this model")
        if sizes[name] != wanted[name]:
            raise Damaged(f"{name} has {sizes[name]} elements, not {wanted[name]}")


def load_optimizer(
    folder: Path, state: TrainingState, optimizer: torch.optim.Optimizer, model: nn.Module, read: Read
) -> None:
    """Read the optimizer's tensors into moments made for the purpose, cut up as their parameters are.

    Groups may be cut differently than when they were saved (one per device mesh): settings go by parameter.

    Args:
        read: `read`, or what does the same for tensors cut in another way.
    """
    present = _stepped(folder)
    settings = {name: stored for stored in state.param_groups for name in stored["params"]}
    for group, names in zip(optimizer.param_groups, contents.group_names(optimizer, model), strict=True):
        for key, value in settings[names[0]].items() if names else ():
            if key != "params":
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for parameter, name in zip(group["params"], names, strict=True):
            if name in present:
                moments = {slot: torch.zeros_like(parameter) for slot in MOMENTS}
                optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}
    moments = contents.optimizer_tensors(optimizer, model)
    read(folder, {f"{OPTIMIZER}{name}": tensor for name, tensor in moments.items()})


@torch.no_grad()
def read(folder: Path, targets: Mapping[str, Tensor], alone: bool = False) -> None:
    """Fill tensors in place from a checkpoint of either kind.

    Args:
        targets: by `tensors_of`'s names; a tensor that FSDP2 has cut up gets this process's part.
        alone: this process reads for itself; otherwise all do so together.
    """
    targets = {name: t.detach() for name, t in targets.items()}
    if is_sharded_checkpoint(folder):
        wanted = {name: _with_dimension(t) for name, t in targets.items()}
    else:
        wanted = {}
        for prefix, file in ((MODEL, contents.MODEL), (OPTIMIZER, contents.OPTIMIZER)):
            own = {name.removeprefix(prefix): t for name, t in targets.items() if name.startswith(prefix)}
            wanted |= {name: t for name, t in own.items() if t.dim()}
            with safe_open(folder / file, framework="pt") as stored:
                for name in own.keys() - wanted.keys():  # scalars, which torch's reader cannot take parts of
                    own[name].copy_(stored.get_tensor(name))
    together = torch.distributed.is_available() and torch.distributed.is_initialized() and not alone
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)


def _with_dimension(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()


def _stepped(folder: Path) -> set[str]:
    """The parameters that a checkpoint has optimizer state of."""
    if is_sharded_checkpoint(folder):
        names = [name.removeprefix(OPTIMIZER) for name in _sizes(folder) if name.startswith(OPTIMIZER)]
    else:
        with safe_open(folder / contents.OPTIMIZER, framework="pt") as file:
            names = list(file.keys())
    return {name.removesuffix("/step") for name in names if name.endswith("/step")}


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
