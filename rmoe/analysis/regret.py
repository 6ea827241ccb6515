"""What a route was worth: the weakest chosen expert of one token in one layer exchanged for the best of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rmoe.moe import Recorder, Recording, RoutingRecord, record, replay

TOKENS = 64
"""Exchanges in each layer."""

BLOCKS = 8
"""Of the text that tokens are sampled from, at most."""


class RouteRegret:
    """Samples how much worse, or better, the next choice would have been.

        change = loss with the (k+1)-th expert in the k-th one's place - loss as routed, in nats

    k-th is the chosen expert of the smallest probability, (k+1)-th the other expert of the largest. Each exchange is a
    row of its own: the block runs again, all its routes forced to the recorded ones but this one (`rmoe.moe.replay`),
    with weights from its live scores; later layers and later tokens keep their experts. The block as it was routed is
    the first row of every batch. Tokens that have fewer than k experts are left out.

    Args:
        model: a language model in evaluation mode, of one stack.
        tokens: exchanges in each layer.
        rows: exchanges per forward pass.
        seed: of the sampled positions.
    """

    def __init__(self, model: nn.Module, tokens: int, rows: int, seed: int = 0) -> None:
        self.model, self.tokens, self.rows = model, tokens, rows
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Measure.

        Args:
            blocks: [N, S] token ids on the model's device, of which at most `BLOCKS` are used, evenly spaced.

        Returns:
            [L, n] float64 changes of the loss of the token's own next token, and of the sum over all later ones;
            NaN for an exchange that cannot be made.

        Raises:
            RequestError: an encoder-decoder. RunError: a router that takes no forced choice.
        """
        count = min(BLOCKS, len(blocks), self.tokens)
        picked = blocks[torch.linspace(0, len(blocks) - 1, count).round().long().to(blocks.device)]
        share = [self.tokens // count + (at < self.tokens % count) for at in range(count)]
        found = [self._of_block(block, tokens) for block, tokens in zip(picked, share, strict=True)]
        own, rest = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        return own, rest

    def _of_block(self, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        recorder = Recorder(self.model)
        with record(self.model) as recording:
            records = recorder(ids[None])
        top_k = [layer.top_k for layer in recorder.called]
        positions = torch.randperm(len(ids) - 1, generator=self._generator)[:tokens].tolist()
        changes = torch.full((2, len(records), len(positions)), torch.nan, dtype=torch.float64)
        waiting = list(_exchanges(recording, records, top_k, positions))
        for start in range(0, len(waiting), self.rows):
            part = waiting[start : start + self.rows]
            losses = self._losses(ids, recording, [changed for _, _, changed in part])
            for row, (layer, at, _) in enumerate(part, start=1):
                change = (losses[row] - losses[0])[positions[at] :]
                changes[0, layer, at], changes[1, layer, at] = change[0], change[1:].sum()
        own, rest = changes
        return own, rest

    def _losses(self, ids: Tensor, recording: Recording, changed: Sequence[Recording]) -> Tensor:
        """[1 + rows, S - 1] float64 next-token losses on the CPU: as it was routed, then as changed."""
        every = [recording, *changed]
        whole = replace(recording, sequences=[one.sequences[0] for one in every])
        with replay(self.model, whole):
            output = self.model(input_ids=ids.expand(len(every), -1), use_cache=False)
        return torch.stack(
            [
                cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().cpu()
                for row in output.logits
            ]
        )


def _exchanges(
    recording: Recording, records: Sequence[RoutingRecord], top_k: Sequence[int], positions: Sequence[int]
) -> Iterator[tuple[int, int, Recording]]:
    """Layer, index of the position, and the recording with that one expert exchanged."""
    (sequence,) = recording.sequences
    for layer, (one, k) in enumerate(zip(records, top_k, strict=True)):
        probs = one.probs[:, : one.num_experts]
        for at, position in enumerate(positions):
            used = (one.experts[position] < one.num_experts).nonzero()[:, 0]
            chosen = one.experts[position, used]
            if len(chosen) < k or len(chosen) >= one.num_experts:
                continue
            slot = int(used[probs[position, chosen].argmin()])
            following = probs[position].index_fill(0, chosen, -1.0).argmax()
            ids = sequence.ids.clone()
            ids[position, layer, slot] = following
            yield layer, at, replace(recording, sequences=[replace(sequence, ids=ids)])
