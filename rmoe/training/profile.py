"""`rmoe train --profile`: a trace of a few steps, and a page that says where their time went.

    DIR/profile/trace.json   for chrome://tracing or ui.perfetto.dev
    DIR/profile/summary.md   time by stage, the least time its matrix products could take, the costliest operators

Modules mark their stage while they run forwards; an operator of the backward pass belongs to the stage whose
operator it differentiates (torch numbers both alike). Nothing that is computed changes.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rmoe.training.hooks import Hook
from rmoe.training.place import say

if TYPE_CHECKING:
    from rmoe.training.loop import Loop

FOLDER, TRACE, SUMMARY = "profile", "trace.json", "summary.md"
STAGES = ("attention", "router", "dispatch", "experts", "head", "optimizer", "other")
WARMUP, STEPS = 2, 3
"""Steps left out first, and steps recorded."""

MARK = "stage: "
ENDINGS = {
    ".self_attn": "attention",
    ".mlp.gate": "router",
    ".mlp.experts": "experts",
    ".mlp.shared_experts": "experts",
    "lm_head": "head",
}
"""How a module's name ends -> its stage. A dense layer's MLP counts as experts."""
DISPATCH = (
    "sort", "bincount", "histc", "cumsum", "index", "scatter", "gather", "nonzero", "where", "unique", "slice", "select"
)  # fmt: skip
"""Operators of the experts that move rows instead of computing."""


@dataclass
class Spent:
    """Sums over the recorded steps."""

    seconds: float = 0.0
    flops: float = 0.0


class StepProfiler(Hook):
    """Records `STEPS` steps of the run in `folder` on its first process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.recorder: profile | None = None
        self.first, self.begun = 0, 0.0
        self.hooks: list[Any] = []

    def begin(self, loop: Loop) -> None:
        left = loop.plan.max_steps - loop.step
        if left == 0:
            say("no step is left to profile")
        self.first = loop.step + min(WARMUP, max(0, left - STEPS))

    def step_begin(self, loop: Loop) -> None:
        if loop.is_main and loop.step == self.first:
            self.hooks = list(mark_stages(loop.model))
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self.recorder = profile(activities=activities, record_shapes=True)
            self.recorder.start()
            self.begun = time.perf_counter()

    def step_end(self, loop: Loop) -> None:
        if self.recorder is None or (loop.step < self.first + STEPS and not loop.ended):
            return
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        self.recorder.stop()
        for hook in self.hooks:
            hook.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recorder.export_chrome_trace(str(self.folder / TRACE))
        rate = matrix_rate(loop.device, torch.bfloat16 if loop.bf16 else torch.float32)
        steps = loop.step - self.first
        tokens = loop.training.batch_size * loop.training.sequence_length // loop.learner.ranks.data
        text = summary(self.recorder.events(), steps, seconds, tokens, rate, loop.device.type)
        (self.folder / SUMMARY).write_text(text, encoding="utf-8")
        self.recorder = None


def mark_stages(model: nn.Module) -> Iterable[Any]:
    """Let each module with a stage say so while it runs; gives handles that undo it."""
    for name, module in model.named_modules():
        found = [stage for ending, stage in ENDINGS.items() if name.endswith(ending)]
        if name.endswith(".mlp") and not hasattr(module, "gate"):
            found = ["experts"]
        if not found:
            continue
        ranges: list[record_function] = []

        def enter(*_: Any, stage: str = found[0], ranges: list[record_function] = ranges) -> None:
            ranges.append(record_function(MARK + stage))
            ranges[-1].__enter__()

        def leave(*_: Any, ranges: list[record_function] = ranges) -> None:
            ranges.pop().__exit__(None, None, None)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, always_call=True)


def by_stage(events: Iterable[Any], device: str) -> dict[str, Spent]:
    """Each event's own time, and the FLOPs of its matrix product, for the stage it belongs to."""
    events = [
        event for event in events if event.device_type == DeviceType.CPU
    ]  # a GPU's kernels are in theirs
    stages: dict[int, str] = {}
    for event in events:
        stage = _own_stage(event)
        if stage is not None and event.sequence_nr >= 0:
            stages.setdefault(event.sequence_nr, stage)
    spent = {stage: Spent() for stage in STAGES}
    for event in events:
        stage = _own_stage(event) or _stage_of_backward(event, stages) or "other"
        if stage == "experts" and any(word in event.name for word in DISPATCH):
            stage = "dispatch"
        micros = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        spent[stage].seconds += micros / 1e6
        spent[stage].flops += product_flops(event.name, event.input_shapes)
    return spent


def _ancestors(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _own_stage(event: Any) -> str | None:
    for parent in _ancestors(event):
        if parent.name.startswith(MARK):
            return str(parent.name.removeprefix(MARK))
        if parent.name.startswith("Optimizer."):
            return "optimizer"
    return None


def _stage_of_backward(event: Any, stages: dict[int, str]) -> str | None:
    for parent in _ancestors(event):
        if parent.name.startswith("autograd::engine::evaluate_function"):
            return stages.get(parent.sequence_nr)
    return None


def product_flops(name: str, shapes: list[Any]) -> float:
    """FLOPs of one matrix product or attention call, two per multiply-add; 0 for anything else.

    >>> product_flops("aten::mm", [[2, 3], [3, 4]])
    48.0
    """
    operator = name.removeprefix("aten::").rstrip("_")
    if operator in ("addmm", "baddbmm"):
        shapes = shapes[1:]
    if operator in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm") and len(shapes) > 1:
        a, b = shapes[:2]
        return 2.0 * math.prod(a) * b[-1]
    if operator.startswith("_scaled_dot_product") and len(shapes) > 2 and len(shapes[2]) == 4:
        queries, keys = (
            shapes[0],
            shapes[2],
        )  # causal: half of the products; backward does five instead of two
        return math.prod(queries) * keys[2] * (5.0 if "backward" in operator else 2.0)
    return 0.0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of some."""
    n = 1024 if device.type == "cpu" else 8192
    # Equal numbers would be faster on a GPU; a generator of its own leaves dropout's stream alone.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def summary(events: Any, steps: int, seconds: float, tokens: int, rate: float, device: str) -> str:
    """The page.

    Args:
        events: of the recorded steps.
        steps: how many. seconds: wall clock of them all. tokens: of one.
        rate: FLOP/s that matrix products could reach. device: type.
    """
    spent = by_stage(events, device)
    total = sum(stage.seconds for stage in spent.values()) or 1e-9
    lines = [
        "# Where the time of a training step goes",
        "",
        f"{steps} steps of {tokens} tokens on {device}, {torch.get_num_threads()} CPU threads, recorded: "
        f"{1e3 * seconds / steps:.1f} ms a step by the clock, {1e3 * total / steps:.1f} ms in the operators below. "
        "Recording itself slows small operators.",
        f"Roofline: the stage's matrix products at {rate / 1e9:.0f} GFLOP/s, which a large one reaches here. "
        "Above it: the share of the stage's time that they do not explain.",
        "",
        "| stage | ms a step | share | GFLOP a step | roofline ms | above the roofline |",
        "|---|---|---|---|---|---|",
    ]
    whole = Spent(total, sum(stage.flops for stage in spent.values()))
    for name, stage in [*spent.items(), ("**all**", whole)]:
        least = stage.flops / rate
        above = f"{max(0.0, 1 - least / stage.seconds):.0%}" if stage.seconds else ""
        figures = (1e3 * stage.seconds / steps, stage.flops / steps / 1e9, 1e3 * least / steps)
        spent_ms, gflop, least_ms = (f"{figure:.2f}" for figure in figures)
        lines.append(
            f"| {name} | {spent_ms} | {stage.seconds / total:.1%} | {gflop} | {least_ms} | {above} |"
        )
    lines += ["", "| operator | calls a step | ms a step | share |", "|---|---|---|---|"]
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in (event for event in events if event.device_type == DeviceType.CPU):
        micros = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        by_name[event.name][0] += 1
        by_name[event.name][1] += micros / 1e6
    for name, (calls, used) in sorted(by_name.items(), key=lambda item: -item[1][1])[:15]:
        lines.append(f"| `{name}` | {calls / steps:.0f} | {1e3 * used / steps:.2f} | {used / total:.1%} |")
    return "\n".join(lines) + "\n"
