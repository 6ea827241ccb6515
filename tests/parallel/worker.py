"""What each of two gloo processes does: every layout's gradients against one process's. Run by test_gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig, RMoEForCausalLM, initialize
from rmoe.parallel import ParallelConfig, Pipeline
from rmoe.parallel.sharding import distribute, whole
from tests.torchrun import end_with
from tests.versions import older

IDS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


def build(router: str) -> RMoEForCausalLM:
    """`smoe`, `smoe tied` for one with tied embeddings, `smoe erc` or `smoe competition` for one trained so."""
    router, _, more = router.partition(" ")
    config = RMoEConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=4,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, initializer_range=0.05, router=router,
        tie_word_embeddings=more == "tied",
        erc_loss_coef=float(more == "erc"),
        competition_rate=float(more == "competition"),
    )  # fmt: skip
    model = RMoEForCausalLM(config)
    initialize(model, 0)
    return model.train()


def one_process(router: str, parts: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the mean over `parts` micro-batches."""
    model = build(router)
    total = 0.0
    for ids in IDS.chunk(parts):
        model.set_routing_noise(0, 0)  # each rank's first
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / parts
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def data_parallel(model: torch.nn.Module, shared_batch: bool = False) -> tuple[float, dict[str, Tensor]]:
    ids = IDS if shared_batch else IDS.chunk(2)[dist.get_rank()]
    out = model(input_ids=ids, labels=ids, use_cache=False, output_logits=False)
    assert (out.logits is None) != shared_batch  # a head split over the vocabulary gives logits
    loss = out.loss
    loss.backward()
    gradients = {
        name.removeprefix("module."): whole(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    value = loss.detach()
    if not shared_batch:
        dist.all_reduce(value)
        value = value / 2
    return value.item(), gradients


def pipelined(router: str) -> tuple[float, dict[str, Tensor]]:
    pipeline = Pipeline(build(router), micro_batches=2)
    loss = torch.tensor(sum(pipeline.step(IDS, IDS)))
    dist.all_reduce(loss)
    found = {name: p.grad for name, p in pipeline.part.named_parameters()}
    return loss.item(), {name: gradient for name, gradient in found.items() if gradient is not None}


LAYOUTS: dict[str, Callable[[str], tuple[float, dict[str, Tensor]]]] = {
    "ddp": lambda router: data_parallel(DistributedDataParallel(build(router))),
    "fsdp2": lambda router: data_parallel(distribute(build(router), ParallelConfig(fsdp=2), 2)),
    "fsdp2+ep": lambda router: data_parallel(distribute(build(router), ParallelConfig(fsdp=2, expert=2), 2)),
    "tp": lambda router: data_parallel(distribute(build(router), ParallelConfig(tensor=2), 2), True),
    "pp": pipelined,
}


def refused() -> list[str]:
    """What is said of batches that no pipeline of two stages can cut."""
    said = []
    uneven = Pipeline(build("rmoe"), micro_batches=3)
    for asked in (lambda: Pipeline(build("rmoe"), micro_batches=1), lambda: uneven.step(IDS, IDS)):
        try:
            asked()
        except RequestError as error:
            said.append(str(error))
    return said


def main(out: str) -> None:
    dist.init_process_group("gloo")
    report: dict[str, object] = {"refused": refused()}
    # The LSTM's state has two parts, which matters where it is sent from stage to stage. Empty slots matter where
    # tokens are sent to experts.
    more = [
        ("pp", "rmoe-lstm"),
        ("fsdp2", "smoe tied"),
        ("fsdp2", "smoe erc"),
        ("fsdp2", "smoe competition"),
        # A single number; a shared matrix that no loss reads; losses of weights, which are whole only in a layer.
        *(("fsdp2", router) for router in ("xmoe", "hyper-moe", "smoe-similarity", "dynmoe")),
        ("fsdp2+ep", "smoe tied"),
        *(("fsdp2+ep", router) for router in ("top-p", "moepp", "remoe", "smoe-capacity")),
    ]
    for layout, router in [*((layout, "rmoe") for layout in LAYOUTS), *more]:
        if (layout == "fsdp2+ep" and older("transformers", "5.23")) or (
            layout == "tp" and older("torch", "2.13")
        ):
            continue
        run = LAYOUTS[layout]
        loss, expected = one_process(router, 1 if layout == "tp" else 2)
        found_loss, found = run(router)
        missing = expected.keys() - found.keys() if layout != "pp" else set()
        errors = {n: ((g - expected[n]).norm() / expected[n].norm()).item() for n, g in found.items()}
        every: list = [None, None]
        dist.all_gather_object(every, (errors, sorted(missing)))
        report[f"{layout} {router}"] = {
            "loss": abs(found_loss - loss),
            "gradients": {name: error for errors, _ in every for name, error in errors.items()},
            "expected": sorted(expected),
            "missing": every[0][1],
        }
    end_with(report, out)


if __name__ == "__main__":
    main(sys.argv[1])
