"""Tensor parallelism: each matrix of attention and of the experts is cut into as many parts as there are processes.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Trains on random tokens for a few steps. All processes see the same batch. `rmoe train --parallel.tensor 2` does this
with data, checkpoints and the rest; here is what a loop of one's own needs.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.parallel import ParallelConfig
from rmoe.parallel.sharding import distribute, total_norm

STEPS = 5


def main() -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    config = RMoEConfig(hidden_size=64, num_hidden_layers=4, num_experts=8, router="rmoe")
    model = RMoEForCausalLM(config)
    initialize(model, seed=0)
    model = distribute(model, ParallelConfig(tensor=world_size), world_size)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    for step in range(1, STEPS + 1):
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(output.router_stats, step, STEPS)
        if dist.get_rank() == 0:
            print(f"step {step}  loss {output.loss.item():.4f}  gradient norm {norm:.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
