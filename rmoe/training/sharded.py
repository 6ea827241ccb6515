"""The tensors of a checkpoint, checked and read back whole or in parts; written in parts.

Where processes hold parts (FSDP2), each writes its own, `shard-*.safetensors` with the offsets in the header, through
`torch.distributed.checkpoint`: nobody ever holds the whole model and nothing is pickled (torch's own format has a
pickled index). Names are `model/<name>` and `optimizer/<parameter>/<slot>`. Any number of processes, and any layout,
can read them back, and the same out of the files that whole processes write (`rmoe.training.state`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from rmoe.training import state as contents
from rmoe.training.checkpoint import Damaged
from rmoe.training.state import Header, TrainingState

PATTERN = "shard-*.safetensors"
MODEL, OPTIMIZER = "model/", "optimizer/"
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def stored_in(folder: Path) -> tuple[dict[str, Header], dict[str, Header]]:
    """The headers of (the model's, the optimizer's) tensors; for parts the shape is the elements in all together.

    Raises:
        Damaged: a file is not safetensors.
    """
    if not is_sharded_checkpoint(folder):
        return contents.headers(folder / contents.MODEL), contents.headers(folder / contents.OPTIMIZER)
    model: dict[str, Header] = {}
    moments: dict[str, Header] = {}
    for path in sorted(folder.glob(PATTERN)):
        for key, (shape, dtype) in contents.headers(path).items():
            found = moments if key.startswith(OPTIMIZER) else model
            name = key.removeprefix(OPTIMIZER).removeprefix(MODEL)
            (before,), _ = found.get(name, ([0], dtype))
            found[name] = [before + math.prod(shape)], dtype
    return model, moments


def check(
    folder: Path, state: TrainingState, expected: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Compare the tensors of a checkpoint of either kind with the model's, before any is loaded.

    Args:
        expected: `unique_tensors` of the whole model. trained: of these, what has optimizer state.

    Raises:
        Damaged: anything is missing, added, or of another shape or dtype; of parts the elements are counted.
    """
    grouped = {name for group in state.param_groups for name in group.get("params", ())}
    for name in sorted(grouped ^ trained.keys()):
        problem = "not trained here" if name in grouped else "without optimizer state"
        raise Damaged(f"{contents.STATE}: {name} is {problem}")
    model, moments = stored_in(folder)
    flat = is_sharded_checkpoint(folder)
    files = (PATTERN, PATTERN) if flat else (contents.MODEL, contents.OPTIMIZER)
    contents.check_tensors(model, expected, files[0], flat)
    wanted: dict[str, Tensor] = {}
    for name in {key.rpartition("/")[0] or key for key in moments}:  # one that never had a gradient has none
        if name not in trained:
            raise Damaged(f"{files[1]}: {name} is no trained parameter of this model")
        wanted |= {f"{name}/{slot}": trained[name] for slot in MOMENTS} | {f"{name}/step": torch.zeros(())}
    contents.check_tensors(moments, wanted, files[1], flat)
    if len(moments) != state.optimizer_tensors:
        raise Damaged(f"{files[1]}: {len(moments)} optimizer tensors, not {state.optimizer_tensors}")


@torch.no_grad()
def read(folder: Path, targets: Mapping[str, Tensor], alone: bool = False) -> None:
    """Fill tensors in place from a checkpoint of either kind.

    Args:
        targets: by `tensors_of`'s names; a tensor that FSDP2 has cut up gets this process's part.
        alone: this process reads for itself; otherwise all do so together.
    """
    targets = {name: t.detach() for name, t in targets.items()}
    wanted: dict[str, Tensor] = {}  # what torch reads: parts, or of parts
    if is_sharded_checkpoint(folder):
        wanted = {name: _with_dimension(t) for name, t in targets.items()}
    else:
        for prefix, file in ((MODEL, contents.MODEL), (OPTIMIZER, contents.OPTIMIZER)):
            own = {name.removeprefix(prefix): t for name, t in targets.items() if name.startswith(prefix)}
            wanted |= {name: t for name, t in own.items() if isinstance(t, DTensor)}
            if own.keys() <= wanted.keys():
                continue
            with safe_open(folder / file, framework="pt") as stored:
                for name in own.keys() - wanted.keys():
                    own[name].copy_(stored.get_tensor(name))
    if wanted:
        together = torch.distributed.is_available() and torch.distributed.is_initialized() and not alone
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)


def _with_dimension(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
