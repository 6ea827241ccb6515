"""What a checkpoint holds, and putting it back: all of it or nothing.

    model.safetensors       every parameter and persistent buffer (router biases and schedules are buffers)
    config.json             the model's configuration, so the folder loads like any model
    optimizer.safetensors   `<parameter>/<slot>`: exp_avg, exp_avg_sq, step
    rng.safetensors         torch's generators, one set per rank
    training_state.json     step, position in the data, schedule, identity of the run, sums not yet logged

Checkpoints of releases that trained with transformers.Trainer also have its trainer_state.json, which nobody reads.
No pickle is written or read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_utils import str_to_torch_dtype

from rmoe.errors import one_line
from rmoe.records import NOT_JSON, Record
from rmoe.training.accounting import Window
from rmoe.training.checkpoint import Damaged

MODEL, OPTIMIZER, RNG, STATE = (
    "model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "training_state.json",
)
STATE_VERSION = 1


class HostRandom(Record, frozen=True, kw_only=True):
    """Python's and numpy's generators of one rank (torch's are tensors and live in `rng.safetensors`)."""

    python: tuple[int, list[int], float | None]
    numpy: tuple[str, list[int], int, int, float]


class TrainingState(Record, frozen=True, kw_only=True):
    """`training_state.json`.

    Attributes:
        step: optimizer steps done, skipped ones included; sequences seen are `step * batch_size`, which
            is the position in the data.
        seed, data_sha256, batch_size, sequence_length: what has to be the same for the run to go on.
        skipped_batches: steps left out because of NaN or infinity.
        train_seconds: wall clock of training steps so far.
        pending: sums that the next metrics row will need.
        scheduler: the learning-rate scheduler's state, of which the step is read.
        param_groups: the optimizer's groups; `params` holds parameter names.
        optimizer_tensors: how many tensors the optimizer's state has.
        host_random: one per rank.
        averaged: how many steps' weights the running average holds.
    """

    schema_version: int = STATE_VERSION
    step: int
    seed: int
    data_sha256: str
    batch_size: int
    sequence_length: int
    skipped_batches: int
    train_seconds: float
    pending: Window
    scheduler: dict[str, Any]
    param_groups: list[dict[str, Any]]
    optimizer_tensors: int
    host_random: list[HostRandom]
    averaged: int = 0


def read_state(folder: Path) -> TrainingState:
    """Read `training_state.json`.

    Raises:
        Damaged: it is not one.
    """
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=TrainingState)
    except (OSError, *NOT_JSON) as error:
        raise Damaged(f"{STATE}: {one_line(str(error))}") from None
    if state.schema_version != STATE_VERSION:
        raise Damaged(f"{STATE} has version {state.schema_version}, not {STATE_VERSION}")
    return state


def write_state(folder: Path, state: TrainingState) -> None:
    """Write `training_state.json`."""
    (folder / STATE).write_bytes(msgspec.json.encode(state))


# --- the model ------------------------------------------------------------------------------------


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names of tied tensors; of each set the first name stays."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():  # tied parameters are one object
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that have optimizer state, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write tensors, wherever they are, into one safetensors file."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, path, metadata=metadata or None)


# --- the optimizer --------------------------------------------------------------------------------


def group_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state, as `<parameter>/<slot>`."""
    tensors = {}
    for group, members in zip(optimizer.param_groups, group_names(optimizer, model), strict=True):
        for parameter, name in zip(group["params"], members, strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{slot}"] = torch.as_tensor(value).detach()
    return tensors


def group_settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's groups as JSON, with names for parameters."""
    names = group_names(optimizer, model)
    return [
        {key: _plain(value) for key, value in group.items() if key != "params"} | {"params": members}
        for group, members in zip(optimizer.param_groups, names, strict=True)
    ]


# --- random numbers -------------------------------------------------------------------------------


def capture_random(device: torch.device) -> tuple[HostRandom, dict[str, Tensor]]:
    """The generators of this process: (Python's and numpy's, torch's by device)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    host = HostRandom(
        python=(version, list(internal), gauss),
        numpy=(str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)),
    )
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return host, tensors


def restore_random(host: HostRandom, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `capture_random` gave."""
    version, internal, gauss = host.python
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = host.numpy
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def save_random(folder: Path, ranks: list[dict[str, Tensor]]) -> None:
    """Write `rng.safetensors`: torch's generators, one set per rank."""
    named = {f"{rank}/{name}": t for rank, tensors in enumerate(ranks) for name, t in tensors.items()}
    save_tensors(folder / RNG, named)


def load_random(folder: Path, rank: int) -> dict[str, Tensor]:
    """One rank's generators; empty when the checkpoint was written by fewer ranks."""
    prefix = f"{rank}/"
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(folder / RNG).items()
        if name.startswith(prefix)
    }


# --- headers --------------------------------------------------------------------------------------

Header = tuple[list[int], str]
"""Shape and dtype of a tensor, the latter by safetensors' name."""


def headers(path: Path) -> dict[str, Header]:
    """The header of every tensor in a file.

    Raises:
        Damaged: it is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path.name}: {one_line(str(error))}") from None


def check_tensors(
    found: Mapping[str, Header], expected: Mapping[str, Tensor], where: str, flat: bool = False
) -> None:
    """Compare what a checkpoint has with what a model expects, reading headers only.

    Args:
        where: the file, for messages.
        flat: `found` has the number of elements for a shape.

    Raises:
        Damaged: anything is missing, added, or different.
    """
    for name in sorted(expected.keys() - found.keys()):
        raise Damaged(f"{where}: {name} is missing")
    for name in sorted(found.keys() - expected.keys()):
        raise Damaged(f"{where}: {name} is not in this model")
    for name, tensor in expected.items():
        shape, dtype = found[name]
        wanted = [tensor.numel()] if flat else list(tensor.shape)
        if shape != wanted:
            said = f"{shape[0]} elements, not {wanted[0]}" if flat else f"shape {shape}, not {wanted}"
            raise Damaged(f"{where}: {name} has {said}")
        if str_to_torch_dtype.get(dtype) != tensor.dtype:
            raise Damaged(f"{where}: {name} is {dtype}, not {tensor.dtype}")


def _plain(value: Any) -> Any:
    """An optimizer setting as JSON: a learning rate may be a tensor."""
    return value.item() if isinstance(value, Tensor) else value
