"""`plan_of(config, cluster)`: every layout's memory, traffic and time, best first."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rmoe.errors import RequestError
from rmoe.model import RMoEConfig
from rmoe.parallel import ParallelConfig
from rmoe.planning.hardware import Cluster
from rmoe.planning.layouts import Memory, layouts_for, longest_stage, memory_of, name_of, traffic_of
from rmoe.planning.trace import Needs, needs_of
from rmoe.records import Record
from rmoe.training.config import RunConfig

PLAN_VERSION = 1
ADAMW_BYTES = 4 * 7  # per parameter and step: read weight, gradient, two moments, write three back


class LayoutPlan(Record, frozen=True, kw_only=True):
    """One layout, at the fastest micro-batch that fits; of equally fast ones at the largest.

    Attributes:
        fits: its peak is within the usable memory.
        micro_batch_size: sequences of one forward pass of a device.
        accumulation: forward passes per optimizer step; in a pipeline the micro-batches that travel through it.
        memory_gib: weights, gradients, optimizer, standing, gathered, activations, loss, layer, peak; on the fullest
            device, see `rmoe.planning.layouts.Memory`.
        activations_gib: `plain` and `checkpointed`, at this micro-batch.
        traffic: what one device sends per step, by collective.
        step_seconds: predicted.
        seconds: what each part would take alone: compute, optimizer, network hidden and exposed, pipeline bubble.
        bound: the part that decides: compute, network or memory.
        tokens_per_second: of the whole cluster.
        options: what to give `rmoe train` besides what the plan was given.
    """

    layout: str
    groups: dict[str, int]
    fits: bool
    micro_batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    memory_gib: dict[str, float]
    activations_gib: dict[str, float]
    traffic: list[dict[str, Any]]
    step_seconds: float
    seconds: dict[str, float]
    bound: str
    tokens_per_second: float
    options: str


class ClusterPlan(Record, frozen=True, kw_only=True):
    """`rmoe plan --json`.

    Attributes:
        parameters: total, active, router, non_embedding, experts.
        flops_per_token: forward, training (forward and backward), router (forward); attention in full squares.
        router_share: of parameters, FLOPs, and the best layout's traffic, as fractions.
        assumptions: what is not read off the model.
        layouts: those that fit first, fastest first.
    """

    schema_version: int = PLAN_VERSION
    router: str
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    router_share: dict[str, float]
    assumptions: dict[str, Any]
    layouts: list[LayoutPlan]


def plan_of(
    config: RMoEConfig,
    cluster: Cluster,
    *,
    sequence_length: int,
    batch_size: int,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool | None = None,
    bf16: bool = True,
    router: str = "",
    run: RunConfig | None = None,
    assumptions: dict[str, Any] | None = None,
) -> ClusterPlan:
    """Plan one optimizer step of `batch_size` sequences of `sequence_length` tokens.

    Args:
        config: the model; only its sizes matter.
        cluster: what it runs on.
        micro_batch_size: sequences of one forward pass of a device; None takes the fastest that fits, and of equally
            fast ones the largest.
        gradient_checkpointing: None takes what is faster among what fits.
        router: its name, to be shown.
        run: the other settings of training, which not every layout accepts; `options` says how to change it. None is
            the defaults.
        assumptions: further ones, to be shown.

    Raises:
        RequestError: a batch that no layout can share out, or a router that cannot be traced.
    """
    run = run or RunConfig()
    needs = needs_of(config, sequence_length, bf16)
    candidates, shared = [], set[int]()
    for layout in layouts_for(config, cluster):
        if batch_size % layout.data:
            continue
        share = batch_size // layout.data
        shared.add(share)
        micros = _divisors(share) if micro_batch_size is None else [micro_batch_size]
        modes = (False, True) if gradient_checkpointing is None else (gradient_checkpointing,)
        choices = [
            _evaluate(needs, config, cluster, layout, micro, share // micro, sequence_length, bf16, mode, run)
            for micro in micros
            if share % micro == 0 and _accepts(run, layout, batch_size, micro)
            for mode in modes
        ]
        if choices:
            candidates.append(min(choices, key=_rank))
    if not candidates:
        if (
            micro_batch_size is not None
            and shared
            and not any(each % micro_batch_size == 0 for each in shared)
        ):
            allowed = f"a divisor of a device's share, {' or '.join(map(str, sorted(shared)))}"
            raise RequestError("training.micro_batch_size", micro_batch_size, allowed)
        raise RequestError("training.batch_size", batch_size, f"shareable among {cluster.devices} devices")
    candidates.sort(key=_rank)
    parameters, flops = needs.parameters, needs.flops
    sent = sum(item["bytes"] for item in candidates[0].traffic)
    return ClusterPlan(
        router=router,
        parameters={
            name: getattr(parameters, name)
            for name in ("total", "active", "router", "non_embedding", "experts")
        },
        flops_per_token=asdict(flops),
        router_share={
            "parameters": parameters.router / parameters.total,
            "flops": flops.router / flops.forward,
            "traffic": sum(item["router_bytes"] for item in candidates[0].traffic) / sent if sent else 0.0,
        },
        assumptions={
            "compute_efficiency": cluster.compute_efficiency,
            "network_efficiency": cluster.network_efficiency,
            "usable_memory": cluster.usable_memory,
            "precision": "bf16 autocast, float32 master weights" if bf16 else "float32",
            **_slots(config),
            **(assumptions or {}),
        },
        layouts=candidates,
    )


def _slots(config: RMoEConfig) -> dict[str, str]:
    """What is said of a router that may leave slots of a token empty: shapes are traced, not choices."""
    said = "all are counted as used; this router may leave some empty, and then needs less"
    return {"slots": said} if config.router_spec.leaves_empty_slots else {}


def _rank(plan: LayoutPlan) -> tuple[bool, float, int, float]:
    """Fitting first, then the fastest, then the largest micro-batch; of those that do not fit the closest."""
    peak = plan.memory_gib["peak"]
    return not plan.fits, plan.step_seconds if plan.fits else peak, -plan.micro_batch_size, peak


def _accepts(run: RunConfig, layout: ParallelConfig, batch: int, micro: int) -> bool:
    """Whether training with the settings of `run` takes this layout: it is asked itself."""
    try:
        replace(
            run,
            parallel=layout,
            training=replace(run.training, batch_size=batch, micro_batch_size=micro),
        )
    except RequestError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _evaluate(
    needs: Needs,
    config: RMoEConfig,
    cluster: Cluster,
    layout: ParallelConfig,
    micro: int,
    passes: int,
    length: int,
    bf16: bool,
    checkpointing: bool,
    run: RunConfig,
) -> LayoutPlan:
    def memory(with_checkpoints: bool) -> Memory:
        return memory_of(needs, config, layout, micro, length, bf16, with_checkpoints, passes)

    held = memory(checkpointing)
    traffic = traffic_of(needs, config, layout, micro, length, passes, bf16, checkpointing)
    flops = needs.flops.training + (needs.flops.forward if checkpointing else 0.0)
    part = longest_stage(config.num_hidden_layers, layout) / config.num_hidden_layers
    compute = passes * micro * length * flops * part / (cluster.flops_per_second(bf16) * layout.tensor)
    bubble = compute * (layout.pipeline - 1) / passes
    optimizer = held.weights / 4 * ADAMW_BYTES / (cluster.accelerator.memory_gb_per_s * 1e9)
    hidden = sum(t.bytes / cluster.bandwidth(t.group) for t in traffic if t.hidden)
    exposed = sum(t.bytes / cluster.bandwidth(t.group) for t in traffic if not t.hidden)
    step = max(compute, hidden) + bubble + exposed + optimizer
    parts = {"compute": max(compute - hidden, 0.0) + min(compute, hidden) * (compute >= hidden) + bubble}
    parts["network"] = exposed + (hidden if hidden > compute else 0.0)
    parts["memory"] = optimizer
    fits = held.peak <= cluster.memory_bytes
    gib = {name: size / 2**30 for name, size in (*asdict(held).items(), ("peak", held.peak))}
    return LayoutPlan(
        layout=name_of(layout),
        groups=asdict(layout),
        fits=fits,
        micro_batch_size=micro,
        accumulation=passes,
        gradient_checkpointing=checkpointing,
        memory_gib=gib,
        activations_gib={
            "plain": memory(False).activations / 2**30,
            "checkpointed": memory(True).activations / 2**30,
        },
        traffic=[asdict(item) for item in traffic],
        step_seconds=step,
        seconds={
            "compute": compute,
            "bubble": bubble,
            "network_hidden": hidden,
            "network_exposed": exposed,
            "optimizer": optimizer,
        },
        bound=max(parts, key=lambda part: parts[part]),
        tokens_per_second=passes * micro * length * layout.data / step,
        options=_options(run, layout, micro, checkpointing),
    )


def _options(run: RunConfig, layout: ParallelConfig, micro: int, checkpointing: bool) -> str:
    """The settings of `rmoe train` that make this layout of `run`."""
    sizes = asdict(layout)
    if layout.replicate == layout.processes:  # DDP is what several processes do by themselves
        sizes["replicate"] = 1
    had = asdict(run.parallel)
    asked = [f"--parallel.{name} {size}" for name, size in sizes.items() if size != had[name]]
    asked.append(f"--training.micro-batch-size {micro}")
    if checkpointing != run.training.gradient_checkpointing:
        asked.append(f"--training.{'' if checkpointing else 'no-'}gradient-checkpointing")
    return " ".join(asked)
