"""What a training step holds at its fullest moment, by torch's memory tracker or by its profiler."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile, record_function

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


def allocated_in_a_step(begin: Callable[[], Callable[[], None]]) -> int:
    """As above, of a step in several forward passes, and with what no operation of Python's makes: DDP's buckets.

    Args:
        begin: makes the model and all else that is to be counted; gives the function that takes a step.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step = begin()
        step(), step()  # DDP arranges its buckets anew after the first
        with record_function("measured"):
            step()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    begun = next(event["ts"] for event in events if event["name"] == "measured")
    held = most = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        if event["ts"] >= begun:
            most = max(most, held)
    return most
