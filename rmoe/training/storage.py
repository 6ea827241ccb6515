"""How a run's tensors get into a checkpoint and out of it again, by how its processes hold them.

    Sharded    every process has a part (FSDP2, with experts dealt out or not): all write, nobody holds everything
    Whole      the first process writes whole tensors: it has them (one process, DDP), or collects parts that cannot be
               written side by side (tensor parallelism: torch 2.13 reports overlapping chunks of the packed experts)
               or that are other tensors altogether (pipelines)

Whole writes the files of `rmoe.training.state`, Sharded those of `rmoe.training.sharded`. Each reads both, so a
checkpoint moves between layouts and numbers of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from rmoe.errors import RunError, one_line
from rmoe.model import RMoEForCausalLM
from rmoe.parallel import Pipeline
from rmoe.parallel.sharding import gathered, is_sharded, whole
from rmoe.training import sharded
from rmoe.training import state as contents
from rmoe.training.checkpoint import CheckpointStore
from rmoe.training.state import TrainingState

Optimizer = torch.optim.Optimizer


class OptimizerRecord(NamedTuple):
    """What `TrainingState` keeps of an optimizer: its groups with names for parameters, and how many tensors it has."""

    groups: list[dict[str, Any]]
    tensors: int


class Storage(ABC):
    """See the module's text."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def collect(
        self, store: CheckpointStore, step: int, optimizer: Optimizer
    ) -> Callable[[Path], OptimizerRecord]:
        """Get ready to write. Collective; the result is for the first process, which gives it a staged folder."""

    def expected(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """(`unique_tensors`, `trained_parameters`) of the whole model: shapes and dtypes are looked at."""
        return contents.unique_tensors(self.model), contents.trained_parameters(self.model)

    def check(self, folder: Path, state: TrainingState) -> None:
        """Look at a checkpoint's tensors before any is loaded. By one process.

        Raises:
            Damaged: they are not this model's.
        """
        sharded.check(folder, state, *self.expected())

    def read(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, each process its own. Collective."""
        sharded.read(folder, targets)

    def load_model(self, folder: Path) -> None:
        """Load the model's tensors, each process its own. Collective."""
        self.read(folder, sharded.tensors_of(self.model))

    def load_optimizer(self, folder: Path, state: TrainingState, optimizer: Optimizer) -> None:
        """Load the optimizer's state into moments made for it, cut up as their parameters are. Collective.

        Groups may be cut differently than when they were saved (one per device mesh): settings go by parameter.
        """
        _, stored = sharded.stored_in(folder)
        settings = {name: group for group in state.param_groups for name in group["params"]}
        members = contents.group_names(optimizer, self.model)
        for group, names in zip(optimizer.param_groups, members, strict=True):
            for key, value in settings[names[0]].items() if names else ():
                if key != "params":
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
            for parameter, name in zip(group["params"], names, strict=True):
                if f"{name}/step" in stored:
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    moments = {slot: torch.zeros_like(parameter) for slot in sharded.MOMENTS}
                    optimizer.state[parameter] = {"step": step, **moments}
        tensors = contents.optimizer_tensors(optimizer, self.model)
        self.read(folder, {f"{sharded.OPTIMIZER}{name}": tensor for name, tensor in tensors.items()})

    @abstractmethod
    def whole_model(self) -> Any:
        """The whole model, with its weights on the first process. Collective."""


class Sharded(Storage):
    """Every process has a part of each tensor, and writes it."""

    def collect(
        self, store: CheckpointStore, step: int, optimizer: Optimizer
    ) -> Callable[[Path], OptimizerRecord]:
        parts = store.staging / f"parts-{step}"
        if dist.get_rank() == 0:
            store.clear_staging()
            parts.mkdir(parents=True)
        dist.barrier()
        try:
            sharded.save(parts, self.model, optimizer)
        except CheckpointException as error:
            said = one_line(str(error))
            raise RunError(
                f"could not save checkpoint-{step}: {said}",
                store.saved(step),
                "free disk space, then --resume",
            ) from error

        def write(folder: Path) -> OptimizerRecord:
            for path in sorted(parts.iterdir()):
                path.rename(folder / path.name)
            parts.rmdir()
            tensors = sum(map(len, optimizer.state.values()))
            return OptimizerRecord(contents.group_settings(optimizer, self.model), tensors)

        return write

    def whole_model(self) -> Any:
        return gathered(self.model)  # type: ignore[arg-type]


class Whole(Storage):
    """The first process writes whole tensors; each reads them and keeps its part.

    Args:
        model: whole, cut up by tensor parallelism, or with `pipeline` its part of one.
    """

    def __init__(self, model: nn.Module, pipeline: Pipeline | None = None) -> None:
        super().__init__(model)
        self.pipeline = pipeline
        self._every: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        if pipeline is not None:
            tensors, trained = super().expected()
            self._every = _union(tensors, pipeline), _union(trained, pipeline)

    def collect(
        self, store: CheckpointStore, step: int, optimizer: Optimizer
    ) -> Callable[[Path], OptimizerRecord]:
        model = self._on_first(contents.unique_tensors(self.model))
        moments = self._on_first(contents.optimizer_tensors(optimizer, self.model))
        groups = self._groups(optimizer)

        def write(folder: Path) -> OptimizerRecord:
            contents.save_tensors(folder / contents.MODEL, model, format="pt")
            contents.save_tensors(folder / contents.OPTIMIZER, moments)
            return OptimizerRecord(groups, len(moments))

        return write

    def expected(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return self._every or super().expected()

    def read(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        full = {
            name: torch.empty(t.shape, dtype=t.dtype) if isinstance(t, DTensor) else t
            for name, t in targets.items()
        }
        sharded.read(folder, full, alone=True)
        for name, target in targets.items():
            if isinstance(target, DTensor):
                part = distribute_tensor(
                    full[name].to(target.device), target.device_mesh, target.placements, src_data_rank=None
                )
                target.to_local().copy_(part.to_local())

    def whole_model(self) -> Any:
        if self.pipeline is None:
            return gathered(self.model) if is_sharded(self.model) else self.model  # type: ignore[arg-type]
        tensors = self.pipeline.state_dict()
        if tensors is None:
            return None
        model = RMoEForCausalLM(self.pipeline.part.config)
        model.load_state_dict(tensors)
        return model

    def _on_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, on the first process; nothing elsewhere. None that was put together stays on a GPU."""
        if self.pipeline is not None:
            return self.pipeline.collect(tensors) or {}
        first, found = not dist.is_initialized() or dist.get_rank() == 0, {}
        for name, tensor in tensors.items():
            full = whole(tensor)
            if first:
                found[name] = tensor if full is tensor else full.cpu()
        return found

    def _groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The groups' settings; stages have the same groups, with their own parameters in them."""
        own = contents.group_settings(optimizer, self.model)
        if self.pipeline is None:
            return own
        every: list[Any] = [None] * self.pipeline.count
        dist.all_gather_object(every, own, group=self.pipeline.stages)
        for group, *others in zip(own, *every, strict=True):
            group["params"] = list(dict.fromkeys(name for other in others for name in other["params"]))
        return own


def _union(tensors: Mapping[str, Tensor], pipeline: Pipeline) -> dict[str, Tensor]:
    """Names, shapes and dtypes of all stages' tensors, without their data. Collective."""
    every: list[Any] = [None] * pipeline.count
    own = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    dist.all_gather_object(every, own, group=pipeline.stages)
    return {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for part in every
        for name, (shape, dtype) in part.items()
    }
