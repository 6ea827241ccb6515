"""Two gloo processes train a grafted model as one process does: data parallelism and FSDP2, checkpointed or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rmoe.graft.attach import CELL
from tests.graft.conftest import grafted
from tests.graft.tiny_families import TOKENS

FAMILIES = ("qwen3_moe", "jamba")
WRAPPERS = ("ddp", "fsdp2")


def model_for(family: str, checkpointing: bool) -> nn.Module:
    model = grafted(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def gradients_after_backward(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name.removeprefix("module.")] = gradient
    return found


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def worker(rank: int, folder: str) -> None:
    """One of two processes: every wrapper, family and checkpointing; rank 0 writes the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for wrapper in WRAPPERS:
        for family in FAMILIES:
            for checkpointing in (False, True):
                model = model_for(family, checkpointing)
                wrapped = shard(model) if wrapper == "fsdp2" else DistributedDataParallel(model)
                gradients = gradients_after_backward(wrapped, TOKENS[rank : rank + 1])
                results[f"{wrapper} {family} {checkpointing}"] = gradients
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gloo")
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.graft.test_distributed", str(rank), str(folder)], cwd=root
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_equal_one_process(
    wrapper: str, family: str, checkpointing: bool, results: dict[str, dict[str, Tensor]]
) -> None:
    expected = gradients_after_backward(model_for(family, False), TOKENS)
    found = results[f"{wrapper} {family} {checkpointing}"]
    assert found.keys() == expected.keys()
    assert any(CELL in name and gradient.abs().max() > 0 for name, gradient in found.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
