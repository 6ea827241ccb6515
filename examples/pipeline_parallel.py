"""A pipeline of stages, the router's state crossing them: one stage per process.

    torchrun --nproc-per-node 2 examples/pipeline_parallel.py

Trains on random tokens for a few steps and saves a model that loads like any other.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_

from rmoe import load
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.parallel import Pipeline

STEPS = 5


def main() -> None:
    dist.init_process_group("gloo")  # "nccl", and a device of its own for each process, on GPUs
    config = RMoEConfig(hidden_size=64, num_hidden_layers=4, num_experts=8, router="rmoe")
    model = RMoEForCausalLM(config)
    initialize(model, seed=0)

    pipeline = Pipeline(model, micro_batches=4)
    parameters = list(pipeline.part.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    for step in range(1, STEPS + 1):
        loss = pipeline.step(ids, ids)
        clip_grads_with_norm_(parameters, 1.0, torch.tensor(pipeline.norm(parameters)))
        optimizer.step()
        optimizer.zero_grad()
        pipeline.part.update_routers(pipeline.stats, step, STEPS)
        if pipeline.is_last:
            print(f"step {step}  loss {sum(loss):.4f}")

    weights = pipeline.state_dict()
    if weights is not None:
        with tempfile.TemporaryDirectory() as folder:
            RMoEForCausalLM(config).save_pretrained(folder, state_dict=weights)
            loss = load(folder)(input_ids=ids, labels=ids).loss
        print(f"saved and loaded: loss {loss.item():.4f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
