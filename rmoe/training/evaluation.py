"""How well a language model predicts a text, over a whole split with the context stated; how it routes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmoe.analysis.measures import RoutingMeasures, Sizes
from rmoe.data.blocks import IGNORED, BlockDataset
from rmoe.model.head import count_next_tokens, next_token_loss
from rmoe.moe.records import RoutingBatch, RoutingRecord
from rmoe.results.run import Histogram, RoutingSummary
from rmoe.training.place import Ranks

TOKENS_PER_BATCH = 8192
"""Tokens of one evaluation forward pass: bounds the memory of the logits."""


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a text.

    Attributes:
        nats: `-sum ln p` over the targets.
        targets: tokens predicted.
        context: what each target was predicted from, in words.
        block_nats: `nats` by block, in order; empty where there are no blocks.
    """

    nats: float
    targets: int
    context: str
    block_nats: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per predicted token, nats."""
        return self.nats / self.targets


def context_of(blocks: BlockDataset, limit: int | None = None) -> str:
    """What a target is predicted from, and how much of the split is evaluated, in words."""
    length, overlap = blocks.sequence_length, blocks.sequence_length - blocks.stride
    part = "" if limit is None or limit >= len(blocks) else f"; the first {limit} of {len(blocks)} blocks"
    return f"{overlap} to {length - 1} tokens before it, in blocks of {length} that share {overlap}{part}"


def evaluate(
    model: PreTrainedModel,
    blocks: BlockDataset,
    *,
    limit: int | None = None,
    bf16: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 - it is frozen
) -> Evaluation:
    """Sum a causal language model's loss over blocks; every target counts once.

    Draws no random number, so how often a run is evaluated does not change what it learns.

    Args:
        model: takes `input_ids` `[B, S]`, returns `.logits` `[B, S, V]`, or None where another process has them;
            put into eval mode and back.
        limit: only so many blocks, from the first; None is all.
        bf16: under bfloat16 autocast, as the model was trained.
        ranks: with several processes each group that sees the same takes its share; the sums are added.
    """
    batches = _batches(blocks, limit, ranks.data_rank, ranks.data)
    nats = torch.zeros((), dtype=torch.float64)
    stop = len(blocks) if limit is None else min(limit, len(blocks))
    by_block = torch.zeros(stop, dtype=torch.float64)
    mine = torch.tensor(range(ranks.data_rank, stop, ranks.data), dtype=torch.int64)  # may be empty
    targets = done = 0
    with inference(model, bf16) as device:
        for batch in batches:
            labels = batch["labels"].to(device)
            logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits
            if logits is None or not ranks.speaks:
                continue
            losses = next_token_loss(logits, labels, "none")
            nats += losses.double().sum().cpu()
            here = mine[done : done + len(labels)]
            by_block[here] = losses.double().sum(-1).cpu()[: len(here)]
            done += len(labels)
            targets += int(count_next_tokens(labels))
    if ranks.world > 1:
        sums = torch.tensor([float(nats), float(targets)], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        nats, targets = sums[0], int(sums[1])
        by_block = by_block.to(device)
        torch.distributed.all_reduce(by_block)
    return Evaluation(float(nats), targets, context_of(blocks, limit), tuple(by_block.tolist()))


def summarize_routing(
    model: PreTrainedModel, blocks: BlockDataset, *, tokens: int = 65_536, bf16: bool = False
) -> RoutingSummary:
    """How an RMoE model routes the first `tokens` tokens of a split (whole blocks, at least one).

    Args:
        model: an `RMoEForCausalLM`.
    """
    limit = min(max(1, tokens // blocks.sequence_length), len(blocks))
    experts, measures = model.config.num_experts, None
    with inference(model, bf16) as device:
        for batch in _batches(blocks, limit):
            routings = model(input_ids=batch["input_ids"].to(device), output_routing=True).routing
            routed = RoutingBatch.stack([RoutingRecord.from_routing(one, experts) for one in routings])
            if measures is None:
                layers, _, slots = routed.experts.shape
                sizes = Sizes(layers, experts, slots, routed.probs.shape[-1])
                total = np.array(
                    [limit * blocks.sequence_length]
                )  # of all ids together: no measure tells them apart
                measures = RoutingMeasures(sizes, total, names=("load", "confidence"))
            measures.update(routed, batch["input_ids"].flatten())
    assert measures is not None
    found = measures.fields(str)
    histogram = found["entropy"]
    return RoutingSummary(
        tokens=histogram.n,
        entropy_nats=found["entropy_mean"].values,
        entropy_histogram=[Histogram(edges=histogram.edges, counts=layer) for layer in histogram.counts],
        load=found["frequency"],
        inner_balance=found["inner_balance"].values,
        outer_balance=found["outer_balance"].values,
    )


def _batches(
    blocks: BlockDataset, limit: int | None, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """This rank's blocks, in order, stacked. No DataLoader: it would draw from torch's default generator.

    Every rank gets as many batches as the others, at the end one without targets if need be: with sharded weights a
    forward pass is something all ranks do together.
    """
    size = max(1, TOKENS_PER_BATCH // blocks.sequence_length)
    stop = len(blocks) if limit is None else min(limit, len(blocks))
    mine = range(rank, stop, world_size)
    most = len(range(0, stop, world_size))  # of the first rank
    for start in range(0, most, size):
        items = [blocks[index] for index in mine[start : start + size]]
        if items:
            yield {key: torch.stack([item[key] for item in items]) for key in items[0]}
        else:
            ids = blocks[0]["input_ids"][None]
            yield {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}


@contextmanager
def inference(model: nn.Module, bf16: bool = False) -> Iterator[torch.device]:
    """Eval mode without gradients, under autocast if asked; yields the model's device."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield device
    finally:
        model.train(training)
