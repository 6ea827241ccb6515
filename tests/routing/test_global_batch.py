"""Counts over two ranks: what each rank's loss uses is the sum over both, and over earlier micro-batches."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rmoe.routing import resolve
from rmoe.routing.balance import counts_in_scope


def rank_counts(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    spec = resolve("smoe-global")
    own = torch.tensor([[1, 2], [3, 4]]) * (10**rank)
    earlier = torch.tensor([[100, 0], [0, 100]]) * (rank + 1)
    got = {
        "first": counts_in_scope(spec.balance, own, None, True),
        "second": counts_in_scope(spec.balance, own, earlier, True),
        "evaluation": counts_in_scope(spec.balance, own, None, False),
        "micro": counts_in_scope(resolve("smoe").balance, own, earlier, True),
    }
    torch.save(got, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(rank_counts, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        own = torch.tensor([[1, 2], [3, 4]]) * (10**rank)
        assert torch.equal(got["first"], torch.tensor([[11, 22], [33, 44]]))
        assert torch.equal(got["second"], torch.tensor([[311, 22], [33, 344]]))
        assert torch.equal(got["evaluation"], own)
        assert torch.equal(got["micro"], own)
