"""What a training step holds at its fullest moment, by torch's memory tracker."""

from __future__ import annotations

import torch
from torch.distributed._tools.mem_tracker import MemTracker

from rmoe.model import RMoEForCausalLM


def peak_of_a_step(net: RMoEForCausalLM, batch: int, length: int, bf16: bool = False) -> int:
    """Bytes of all of this process's tensors at the fullest moment of a training step that has optimizer state."""
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    ids = torch.randint(0, net.config.vocab_size, (batch, length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = net(input_ids=ids, labels=ids, use_cache=False, output_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    tracker = MemTracker()
    tracker.track_external(net, optimizer, ids)
    with tracker:
        step()
    (device,) = tracker.get_tracker_snapshot("peak").values()
    return next(size for kind, size in device.items() if str(kind).endswith("Total"))
