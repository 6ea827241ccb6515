"""What each of two gloo processes does: steps under FSDP2 and DDP, their tensors counted. Run by test_sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.parallel import ParallelConfig
from rmoe.parallel.sharding import distribute
from rmoe.planning.layouts import memory_of
from rmoe.planning.trace import needs_of
from rmoe.training.accounting import StepSums
from rmoe.training.config import RunConfig
from rmoe.training.learner import ModelLearner
from rmoe.training.place import Place, Ranks, accelerator_of
from tests.planning.peak import allocated_in_a_step, peak_of_a_step
from tests.torchrun import end_with
from tests.versions import older

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_experts": 16,
    "num_experts_per_tok": 2, "moe_intermediate_size": 192, "first_k_dense_replace": 1,
}  # fmt: skip
LENGTH = 128
CASES = {  # micro-batch, expert parallelism, bfloat16, gradient checkpointing
    "many tokens": (4, 1, False, False),
    "few tokens": (1, 1, False, False),
    "few tokens, bf16": (1, 1, True, False),
    "many tokens, bf16, checkpointing": (4, 1, True, True),
    "many tokens, bf16, EP": (4, 2, True, False),
}

COPIED = {  # micro-batch, tokens of a sequence, forward passes of a step
    "DDP, many tokens": (4, 128, 1),
    "DDP, few tokens": (1, 32, 1),
    "DDP, many tokens, two passes": (4, 128, 2),
    "DDP, few tokens, two passes": (1, 32, 2),
}


def sharded(expert: int) -> RMoEForCausalLM:
    config = RMoEConfig(**SIZES)
    model = RMoEForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    initialize(model, 0)
    return distribute(model, ParallelConfig(fsdp=2, expert=expert), 2).train()


def peak(batch: int, expert: int, bf16: bool, checkpointing: bool) -> int:
    """`peak_of_a_step` of this process's part."""
    net = sharded(expert)
    if checkpointing:
        net.gradient_checkpointing_enable()
    return peak_of_a_step(net, batch, LENGTH, bf16)


def copied(batch: int, length: int, passes: int) -> int:
    """`allocated_in_a_step` of this process's copy under DDP, as training has it."""

    def begin() -> Callable[[], None]:
        net = RMoEForCausalLM._from_config(
            RMoEConfig(**SIZES), attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
        place = Place(cpu=True, bf16=False, ranks=Ranks(2, dist.get_rank()))
        accelerator = accelerator_of(RunConfig(), Path(), place, unused=True)
        learner = ModelLearner(net.train(), accelerator, place.ranks, passes)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        ids = torch.randint(0, 512, (batch, length))

        def step() -> None:
            batches = [{"input_ids": ids, "labels": ids} for _ in range(passes)]
            learner.accumulate(batches, StepSums(place.ranks))
            optimizer.step()
            optimizer.zero_grad()

        return step

    return allocated_in_a_step(begin)


def cut_after_each_micro_batch() -> list[bool]:
    """Whether all gradients are shards, after each micro-batch of a step of two."""
    net = sharded(1)
    accelerator = Accelerator(cpu=True)
    learner = ModelLearner(net, accelerator, Ranks(2, dist.get_rank()), 2)
    found = []
    backward = accelerator.backward

    def looked_at(loss: Tensor) -> None:
        backward(loss)
        found.append(all(isinstance(p.grad, DTensor) for p in net.parameters()))

    accelerator.backward = looked_at
    ids = torch.randint(0, 512, (1, 16))
    learner.accumulate([{"input_ids": ids, "labels": ids}] * 2, StepSums())
    return found


def main(out: str) -> None:
    dist.init_process_group("gloo")
    report: dict[str, object] = {"cut": cut_after_each_micro_batch()}
    for case, (batch, expert, bf16, checkpointing) in CASES.items():
        if expert > 1 and older("transformers", "5.23"):
            continue
        config, layout = RMoEConfig(**SIZES), ParallelConfig(fsdp=2, expert=expert)
        planned = memory_of(
            needs_of(config, LENGTH, bf16), config, layout, batch, LENGTH, bf16, checkpointing
        )
        report[case] = {"planned": planned.peak, "real": peak(batch, expert, bf16, checkpointing)}
    for case, (batch, length, passes) in COPIED.items():
        config, layout = RMoEConfig(**SIZES), ParallelConfig(replicate=2)
        needs = needs_of(config, length, bf16=False)
        planned = memory_of(needs, config, layout, batch, length, False, False, passes)
        report[case] = {"planned": planned.peak, "real": copied(batch, length, passes)}
    end_with(report, out)


if __name__ == "__main__":
    main(sys.argv[1])
