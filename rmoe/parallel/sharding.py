"""A model spread over processes by transformers' `DistributedConfig`: FSDP2, tensor and expert parallelism.

Plain data parallelism needs none of this: several processes make accelerate wrap the model in DDP. Pipelines are
`rmoe.parallel.pipeline`.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from rmoe.compat import prune_expert_plan, prune_fsdp_plan
from rmoe.errors import RequestError
from rmoe.model import RMoEForCausalLM
from rmoe.parallel.config import ParallelConfig
from rmoe.parallel.fit import require_fit

T = TypeVar("T", bound=Tensor)


# How accelerate is told to cut a model up, by what starts the processes.
_ACCELERATES = {
    "ACCELERATE_USE_FSDP": "ask for FSDP2 with --parallel.fsdp N",
    "ACCELERATE_USE_DEEPSPEED": "ask for sharding with --parallel",
    "ACCELERATE_USE_MEGATRON_LM": "ask for sharding with --parallel",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "ask for sharding with --parallel",
}


def require_own_layout() -> None:
    """Refuse accelerate's own sharding: dropped on a CPU, and behind our checkpoints' back on a GPU.

    Raises:
        RequestError: the environment asks for it, as `accelerate launch` sets it.
    """
    for name, instead in _ACCELERATES.items():
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise RequestError(name, os.environ[name], f"unset: {instead}")


def distribute(model: RMoEForCausalLM, parallel: ParallelConfig, world_size: int) -> RMoEForCausalLM:
    """Shard a model that every process holds with equal weights; each keeps its part.

    Args:
        model: whole, on the CPU or this process's device.
        parallel: group sizes; all 1 leaves the model as it is.
        world_size: processes in all.

    Raises:
        RequestError: sizes that do not multiply to the number of processes, or that do not fit the model.
    """
    require_own_layout()
    parallel.require_processes(world_size)
    if not parallel.shards:
        return model
    require_fit(model.config, parallel)
    prune_expert_plan(model, model.config.without_absent)
    if model.config.tie_word_embeddings:
        # One group of FSDP2 must have both ends: the model's own, which has what no rule names.
        prune_fsdp_plan(model, ("lm_head", "model.embed_tokens"))
    settings = _distributed_config(parallel)
    settings, _, mesh = type(model).prepare_distribute_model(settings)
    model = type(model).maybe_distribute_model(model, settings, mesh)
    return model


def _distributed_config(parallel: ParallelConfig) -> object:
    """transformers' configuration; 5.17 has no separate expert group and no replicas."""
    from transformers.distributed.configuration_utils import DistributedConfig

    known = DistributedConfig.__dataclass_fields__.keys()
    wanted = {
        "fsdp_size": parallel.fsdp,
        "tp_size": parallel.tensor,
        "ep_size": parallel.expert,
        "dp_replicate_size": parallel.replicate,
    }
    missing = [name for name, size in wanted.items() if size > 1 and name not in known]
    if missing:
        raise RequestError("parallel", ", ".join(missing), "a transformers that has it (5.23 does)")
    return DistributedConfig(**{name: size for name, size in wanted.items() if name in known})


def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """A whole copy of a sharded model on the CPU, filled on the first process only. Collective."""
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    target = type(model)(config)
    own = target.state_dict()
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if torch.distributed.get_rank() == 0:
            own[name].copy_(full)
    return target


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is only a part of one."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm over all tensors, whichever devices their parts are on; the same on every process.

    Tensors of different device meshes (experts and the rest) cannot meet in one call, so their norms are taken mesh
    by mesh.
    """
    norms = [whole(get_total_norm(group)) for group in by_mesh(tensors)]
    if not norms:
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scale gradients, whose `total_norm` is `norm`, to a norm of at most `most`."""
    with_gradient = [p for p in parameters if p.grad is not None]
    for group in by_mesh(with_gradient):
        clip_grads_with_norm_(group, most, norm)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Tensors by the device mesh they are cut over, in the order of first appearance."""
    found: dict[object, list[T]] = defaultdict(list)
    for tensor in tensors:
        found[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return list(found.values())


def average_replicated(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of what no mesh is responsible for over all processes. Collective."""
    for p in parameters:
        if p.grad is not None and not isinstance(p, DTensor):
            torch.distributed.all_reduce(p.grad)
            p.grad /= torch.distributed.get_world_size()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one: a collective, which every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
